"""One worker process of a run: the one place where its parts are put together.

`run_job` is the same in this process, under Ray and under torchrun; a Control tells it what the outside wants.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from raytrain.config.sections import Config
from raytrain.data.feed import Feed
from raytrain.data.loader import fork_server
from raytrain.engine.broadcast import take_from_rank_0
from raytrain.engine.determinism import prepare_torch
from raytrain.engine.hardware import hardware_notes
from raytrain.engine.optim import unused_options
from raytrain.engine.own_state import OwnState
from raytrain.engine.randomness import seed_all
from raytrain.engine.state import RunState, build_run, compile_model
from raytrain.engine.world import World
from raytrain.errors import ConfigError
from raytrain.journal.run_folder import RunFolder
from raytrain.keeper.checkpointer import Checkpointer
from raytrain.keeper.client import KeeperClient, is_possible, join_keeper, start_keeper
from raytrain.keeper.heartbeat import Heartbeat, Stacks, Stragglers, start_heartbeat
from raytrain.progress import Plan, Progress
from raytrain.storage.forks import tend_forks
from raytrain.storage.store import Store, checkpoint_name
from raytrain.task import Task, load_task_class, make_task
from raytrain.training.contract import check_dataset
from raytrain.training.control import Control
from raytrain.training.environment import differences
from raytrain.training.job import Job
from raytrain.training.last_batch import last_batch_notes, refuse_lone_sample
from raytrain.training.loop import train_model
from raytrain.training.recorder import Recorder
from raytrain.training.resume import Origin, bring_to_start, why_not_exact
from raytrain.training.run_journal import is_resize, open_journal, write_end
from raytrain.training.sameness import (
    arrays_of,
    check_on_all_ranks,
    compare_loader_workers,
    compare_with_checkpoint,
    names_of,
    probe_keys,
    record_of,
    samples_in,
)
from raytrain.training.source import ranks_of_other_source, source_of


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended: status "finished" or "stopped", and where."""

    status: str
    progress: Progress
    metrics: dict[str, float]
    best: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Restored:
    """Where a run lives: its folder, what keeps its states, and what it goes on from.

    keeper: this process's side of it; None where the system has none
    notes:  what a user should know of the origin, a line each
    """

    folder: RunFolder
    checkpointer: Checkpointer
    keeper: KeeperClient | None
    heartbeat: Heartbeat
    origin: Origin | None
    notes: list[str]


def run_job(
    job: Job, world: World, control: Control, datasets_of: Callable[[], dict[str, Any]] | None = None
) -> Outcome:
    """Collective. Build the run, bring it to where it goes on, and train it.

    datasets_of: gives the data sets, in place of the task
    """
    with contextlib.ExitStack() as stack:
        keeper_thread = prepare(job, world)
        run, feed, notes = build(job, world, control, datasets_of)
        restored = restore(job, run, feed, control, keeper_thread, stack)
        recorder = open_recorder(job, run, feed, control, restored, stack)
        recorder.notes += notes
        return train(job, recorder, restored)


def prepare(job: Job, world: World) -> threading.Thread | None:
    """What comes before the user's code: torch's settings, care for what it forks, and the keeper, which starts
    meanwhile."""
    prepare_torch(job.cfg, world.device)
    tend_forks()
    fork_server(job.cfg.TASK.partition(":")[0])
    return start_keeper(job.run_uri, job.launch) if world.is_first and is_possible() else None


def build(
    job: Job, world: World, control: Control, datasets_of: Callable[[], dict[str, Any]] | None
) -> tuple[RunState, Feed, list[str]]:
    """Collective. The run at step 0 and its batches, of what the task gives; and what a user should know of them."""
    cfg = job.cfg
    control.begin("Making the task")
    seed_all(cfg.SEED, "task")
    load_task_class(cfg.TASK)
    notes = differences(job.environment, world)
    task = make_task(cfg)
    control.begin("Building the data sets")
    datasets = datasets_of() if datasets_of else build_datasets(task, cfg.SEED)
    built = record_of(datasets)
    notes += check_on_all_ranks(built, world)
    control.begin("Building the model")
    run = build_run(cfg, task, datasets["train"], plan_of(cfg, len(datasets["train"]), world), world)
    run.built = {**built, "names": names_of(task, datasets), "arrays": arrays_of(task, run.model, datasets)}
    run.own, run.source = OwnState.of(task, datasets), source_of(cfg.TASK)
    notes += take_from_rank_0(run.model, world)
    notes += [
        *hardware_notes(world, run.hardware),
        *why_not_exact(run, cfg.SCALE.is_elastic),
        *ranks_of_other_source(world, run.source),
        *run.mode.notes,
        *last_batch_notes(run.plan),
    ]
    notes += [*unused_options(cfg.OPTIMIZATION), *compile_model(run, cfg.OPTIMIZATION)]
    evaluates_after, channels_last = evaluation_epochs(cfg, datasets), cfg.OPTIMIZATION.CHANNELS_LAST
    feed = Feed(task, datasets, run.plan, world, cfg.LOADER, cfg.SEED, evaluates_after, channels_last)
    return run, feed, notes


def restore(
    job: Job,
    run: RunState,
    feed: Feed,
    control: Control,
    keeper_thread: threading.Thread | None,
    stack: contextlib.ExitStack,
) -> Restored:
    """Collective. Join the keeper, take the run folder, and bring the run to where it goes on."""
    folder = RunFolder(job.run_uri)
    stack.callback(folder.close)
    store = Store(folder.storage, job.cfg.CHECKPOINT, job.launch)
    control.begin("Joining the process that keeps the run's state")
    if keeper_thread is not None:
        keeper_thread.join()
    keeper, no_keeper = join_keeper(job.run_uri, job.launch, run.world)
    heartbeat = Heartbeat()
    if keeper is not None:
        stack.callback(keeper.close)
        if torch.distributed.is_initialized():  # else nothing would start this process again, or a debugger has it
            heartbeat = watch(run, feed, keeper)
    control.follow(run, feed)
    if run.world.is_first:
        stack.enter_context(folder.locked(tell=control.tell_of_wait))
        store.clean_leftovers()
    checkpointer = Checkpointer(store, keeper)
    checkpointer.notes += no_keeper
    origin, notes = bring_to_start(run, store, job, keeper)
    return Restored(folder, checkpointer, keeper, heartbeat, origin, notes)


def open_recorder(
    job: Job, run: RunState, feed: Feed, control: Control, restored: Restored, stack: contextlib.ExitStack
) -> Recorder:
    """Collective. The run's journal with what starts written down, and its first checkpoint where one is owed."""
    checkpointer, notes = restored.checkpointer, restored.notes
    checkpointer.describe(run, job.driver)
    checkpointer.prepare(run)
    if run.engine.why_ddp is not None:
        notes.append(f"ENGINE ddp, parameter by parameter, instead of flat buffers: {run.engine.why_ddp}")
    evaluates = feed.evaluates_after(run.progress.epoch)
    run.unevaluated = run.unevaluated if evaluates else None
    journal, restart = open_journal(restored.folder, run, job, control, restored.origin, notes)
    for hang in restored.keeper.hangs if restored.keeper else ():
        journal.write("event", event="hang", **hang)
    stack.callback(journal.close)
    stack.callback(feed.close)
    recorder = Recorder(run, feed, checkpointer, journal, control, restored.heartbeat, restored.folder)
    if restart is not None and is_resize(restart, run.world.size):
        recorder.resize = restart
    if run.world.broadcast_object(owes_checkpoint(run, checkpointer.store, restored.origin)):
        recorder.save(metrics=None if evaluates else {})
        run.unevaluated = checkpoint_name(run.progress) if evaluates else None
    return recorder


def start_feed(job: Job, recorder: Recorder, restored: Restored) -> None:
    """Collective. The feed gives batches from here on; first a few samples, to be compared with what they should be."""
    run, feed, origin = recorder.run, recorder.feed, restored.origin
    # Samples of a data set with a state depend on that too: at a resume they are not what they were at the start.
    probes = [] if run.own.of_datasets else probe_keys(run.plan.num_samples, run.plan.batch_size)
    twice = probes[:1] if job.cfg.LOADER.WORKERS > 1 else []  # by the first loader worker, and then by the second
    own = copy.deepcopy(run.own.save())
    feed.start(run.progress, evaluate_first=run.unevaluated is not None, probes=[*twice, *probes])
    by_first = samples_in(feed, twice)
    run.built["samples"] = samples_in(feed, probes)
    run.own.put_back(own, "the start of this run")  # what making these samples has moved
    notes = compare_loader_workers(by_first, run.built["samples"])
    notes += check_on_all_ranks({key: run.built[key] for key in ("names", "arrays", "samples")}, run.world)
    if origin is not None and origin.manifest is not None:
        # So may batches be that a task with a state makes: the same on each rank, but not what they were at the start.
        by_state = "task" in run.own.owners and type(feed.task).collate is not Task.collate
        now = {key: value for key, value in run.built.items() if key != "samples" or not by_state}
        notes += compare_with_checkpoint(origin.manifest.world.get("built", {}), now)
    for note in notes:
        recorder.journal.write("event", event="note", message=note)
    restored.checkpointer.describe(run, job.driver)


def train(job: Job, recorder: Recorder, restored: Restored) -> Outcome:
    """Collective. Train what is left; then pictures, the journal's last record, and the end of the keeper."""
    run, feed, began_s = recorder.run, recorder.feed, time.monotonic()
    refuse_lone_sample(run)
    start_feed(job, recorder, restored)
    is_done = train_model(run, feed.task, feed, recorder)
    status, seconds = "finished" if is_done else "stopped", time.monotonic() - began_s
    if not is_done and run.world.broadcast_object(run.world.is_first and recorder.control.is_moved()):
        return Outcome(status, run.progress, run.metrics, run.best)  # nothing ends: the keeper too is there for others
    if run.world.is_first:
        pictures = recorder.draw(recorder.validation) if is_done else None
        write_end(recorder.journal, run, recorder.checkpointer.store, status, seconds, pictures)
    if restored.keeper is not None and restored.keeper.leads:
        restored.keeper.end()
    return Outcome(status, run.progress, run.metrics, run.best)


def watch(run: RunState, feed: Feed, keeper: KeeperClient) -> Heartbeat:
    """From now on the keeper kills this process if it stops making progress, and rank 0 looks for stragglers."""
    stacks = Stacks()
    timeout_s = run.config["SCALE"]["HANG_TIMEOUT"]
    heartbeat = start_heartbeat(keeper, stacks, run.world.rank, len(run.world.block), timeout_s)
    if run.world.is_first:
        heartbeat.stragglers = Stragglers(keeper.status, time.monotonic())
    feed.stacks_path, feed.beat, run.engine.beat = stacks.path, heartbeat.beat, heartbeat.beat
    return heartbeat


def build_datasets(task: Task, seed: int) -> dict[str, Any]:
    """The data sets by split; "val" is left out where the task has none.

    What a task draws at random here (a split of its own) is the same on every process and at
    every resume, and in both splits: else training would see what it is evaluated on.
    """
    seed_all(seed, "datasets")
    datasets = {"train": task.build_dataset("train")}
    check_dataset(datasets["train"], "train", task)
    seed_all(seed, "datasets")
    val = task.build_dataset("val")
    if val is not None:
        check_dataset(val, "val", task)
        datasets["val"] = val
    return datasets


def plan_of(cfg: Config, num_samples: int, world: World) -> Plan:
    """How the data is cut into steps; a ConfigError where none is left."""
    optim_cfg, size = cfg.OPTIMIZATION, cfg.OPTIMIZATION.BATCH_SIZE_PER_GPU
    workers, last = world.virtual_workers, cfg.LOADER.LAST
    plan = Plan(num_samples, size, workers, optim_cfg.ACCUMULATE, optim_cfg.NUM_EPOCHS, last)
    if plan.steps_per_epoch == 0:
        raise ConfigError(
            f"LOADER.LAST is drop, and {num_samples} samples are not one whole batch of {size} for each of {workers} "
            "virtual workers, so nothing is left to train on; set it to keep or pad, or BATCH_SIZE_PER_GPU lower"
        )
    return plan


def evaluation_epochs(cfg: Config, datasets: dict[str, Any]) -> Callable[[int], bool]:
    """Whether the validation split is read once that many epochs are finished."""
    return lambda epoch: "val" in datasets and cfg.EVAL.due(epoch, cfg.OPTIMIZATION.NUM_EPOCHS)


def owes_checkpoint(run: RunState, store: Store, origin: Origin | None) -> bool:
    """True if the run starts at the end of an epoch whose checkpoint its own folder does not hold yet.

    From a finished run's checkpoint elsewhere, or from memory that was all that was left.
    """
    if origin is None or origin.name is not None or run.progress.cursor > 0:
        return False
    if not origin.is_memory and not run.plan.finished(run.progress):
        return False
    return checkpoint_name(run.progress) not in [entry.name for entry in store.listed()]
