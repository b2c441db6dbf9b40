"""What to write instead, by the trial that came out otherwise and by what differs first in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raytrain.proof.difference import Difference

OF_COUNTS = (
    "What build_dataset counts (files that are found, a random split) must be the same in each process: sort, seed, "
    "give all the same files"
)
OF_SAMPLES = (
    "Let what a sample is depend on its id, on what set_epoch(epoch) sets, and on draws from random, numpy.random, "
    "torch or a generator that is an attribute of the data set: these are seeded for each sample and each epoch; a "
    "clock, os.urandom, a generator made on the spot, or one hidden in an iterator is not"
)
OF_STEPS = (
    "Let model_func draw from torch, numpy.random, random or a generator that is an attribute of task or model: these "
    "are seeded for each step; and read self.progress (epoch, step, share) in place of a clock, a file, or what a "
    "thread has done by then"
)
OF_FIRST_WEIGHTS = (
    "Let build_model draw from torch, numpy.random or random, which are seeded for it; not from os.urandom, a clock, "
    "or a generator made without a seed"
)
OF_LOADERS = (
    "A batch must be the same whoever makes it: let it not depend on get_worker_info(), on the process, on which "
    "samples that process made before, or on what training changes in task or data set, which loader workers have as "
    "it was (in collate read self.progress); raytrain seeds each sample itself"
)
LEFT_BY_LOADING = (
    "model_func reads what loading leaves behind in the process that loads, which is a loader worker now: put it into "
    "the batch (collate)"
)
OF_SETS = (
    "The order of a set, or hash(), is another one in each process: number names by sorted(...), and take hashlib "
    "where a hash has to last. raytrain fixes PYTHONHASHSEED, so its own runs agree; what uses the weights elsewhere "
    "does not"
)
OF_RANKS = (
    "Let what is trained not depend on the rank or on how many workers there are (torch.distributed, RANK and "
    "WORLD_SIZE), but on the batch, self.progress and draws, which are seeded for each step and virtual worker"
)
BEGUN_ANEW = (
    "Something began anew with the process, and no checkpoint holds it: an iterator, a file, a library's own state. "
    "Compute it of self.progress (epoch, step, share), or hold it as an attribute of the task that state_dict() gives "
    "and load_state_dict(state) takes"
)
OF_MODES = (
    "Each epoch, and a resume, begins with the mode that build_model left: call train() and eval() there, or by "
    "self.progress whenever model_func is called"
)
OF_MODULES = "Hold it in {task} as self.NAME, and write state_dict() and load_state_dict(state) there"
UNSAVED = {
    "task": "Read self.progress (epoch, step, share) instead, or write state_dict() and load_state_dict(state) in "
    "{task}",
    "model": "Make it a tensor, by register_buffer() without persistent=False, or modules in nn.ModuleList, not in a "
    "list; or compute it of self.progress in model_func",
    "data": "Let a sample depend on its id and set_epoch(epoch) alone, or write state_dict() and "
    "load_state_dict(state) in {data} and set LOADER.WORKERS: 0",
}
OF_ITS_OWN = {
    "task": "Each worker process has its own: read self.progress (epoch, step, share) instead, which is the same in "
    "all, or put it into the batch",
    "model": "Each worker process has its own: make it a tensor, by register_buffer(), which all get from virtual "
    "worker 0, or read self.progress in model_func",
    "data": "Each process that loads has its own: let a sample depend on its id and set_epoch(epoch) alone",
}


def remedy(trial: str, difference: Difference, classes: Mapping[str, str], asked: Sequence[str]) -> str:
    """One sentence or two.

    trial:   kind of the trial that differs: again, loaders, resumed, hash_seed or workers
    classes: names of the classes of task, model and data (set)
    asked:   where the user's code asked for its rank
    """
    if difference.kind == "samples":
        return OF_COUNTS
    by_trial = {"again": of_again, "loaders": of_loaders, "resumed": of_resumed, "workers": of_workers}
    chosen = by_trial[trial](difference, owner_of(difference, classes), asked) if trial in by_trial else OF_SETS
    return chosen.format(**classes)


def of_again(difference: Difference, owner: str, asked: Sequence[str]) -> str:
    if difference.kind == "weights":
        return OF_FIRST_WEIGHTS
    return OF_SAMPLES if difference.kind == "batch" else OF_STEPS


def of_loaders(difference: Difference, owner: str, asked: Sequence[str]) -> str:
    if difference.kind not in ("batch", "failure"):
        return LEFT_BY_LOADING
    return UNSAVED["data"] if owner == "data" else OF_LOADERS


def of_resumed(difference: Difference, owner: str, asked: Sequence[str]) -> str:
    if difference.kind == "weights":
        return UNSAVED["model"]
    if owner == "model" and difference.changes[0].name.endswith(".training"):
        return OF_MODES
    if owner:
        return UNSAVED.get(owner, OF_MODULES)
    return UNSAVED["data"] if difference.kind == "batch" else BEGUN_ANEW


def of_workers(difference: Difference, owner: str, asked: Sequence[str]) -> str:
    if asked:
        return OF_RANKS
    if owner:
        return OF_ITS_OWN.get(owner, OF_ITS_OWN["task"])
    return OF_LOADERS if difference.kind == "batch" else OF_RANKS


def owner_of(difference: Difference, classes: Mapping[str, str]) -> str:
    """Who holds what differs first: task, model or data; module, if none of them; "" if nothing is known to differ."""
    if not difference.changes:
        return ""
    root = difference.changes[0].name.partition(".")[0]
    return next((owner for owner, name in classes.items() if name == root), "module")
