"""One trial of a proof, in a process of its own: a run of few steps by the true loop, written down as a trace.

It has no run folder, no keeper, no journal and no evaluation; all else is as `run_job` of training/worker.py has it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing.util
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from raytrain.config.sections import Config
from raytrain.data.loader import fork_server
from raytrain.engine.determinism import device_here, prepare_torch
from raytrain.engine.state import payload_of, restore
from raytrain.engine.world import World
from raytrain.errors import EXIT_FAILED, as_seen, failure_of, is_users, lost_another
from raytrain.proof.observer import Observer, SeenFeed
from raytrain.storage.forks import end_with_parent, tend_forks
from raytrain.storage.processes import write_stacks_to
from raytrain.storage.state_file import dumps, load_file
from raytrain.training.control import Control
from raytrain.training.job import Job
from raytrain.training.loop import train_model
from raytrain.training.recorder import Recorder
from raytrain.training.worker import build

RANKS = ("get_rank", "get_world_size")  # of torch.distributed


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one process of a trial is to do.

    cfg:     the config as a tree, with all that the trial decides
    steps:   to take at most, from the run's beginning
    state:   the file of the state after half of the steps
    resumes: whether it goes on from there; else it begins at the beginning
    saves:   whether it leaves that file
    folder:  for its trace, its output, and where its processes meet
    """

    cfg: dict[str, Any]
    steps: int
    state: str
    folder: str
    rank: int = 0
    size: int = 1
    resumes: bool = False
    saves: bool = False
    search_path: tuple[str, ...] = ()

    @property
    def trace(self) -> Path:
        return Path(self.folder) / f"trace_{self.rank}.json"

    @property
    def output(self) -> Path:
        return Path(self.folder) / f"output_{self.rank}.txt"

    @property
    def stacks(self) -> Path:
        return Path(self.folder) / f"stacks_{self.rank}.txt"


def take_in_fork(trial: Trial) -> None:
    """In a process that is a copy of the command's, by module multiprocessing."""
    end_with_parent()
    # It has the command's generators, too, and would draw what the other trials draw before these are seeded.
    random.seed()
    np.random.seed()
    torch.seed()
    take(trial)


def take(trial: Trial) -> None:
    """Takes the trial, and leaves its trace, which may be a failure; this process is for nothing else."""
    os.setpgid(0, 0)  # Ctrl-C is for the command alone, which ends this group
    descriptor = os.open(trial.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    write_stacks_to(str(trial.stacks))
    sys.path[:] = trial.search_path
    place = Control()
    try:
        trace = taken(trial, place)
    except (Exception, SystemExit) as error:
        seen = as_seen(failure_of(error, trial.rank, place.place(), ""))
        status = getattr(error, "exit_status", EXIT_FAILED)
        trace = {"failed": str(seen), "status": status, "follows": lost_another(error)}
    beside = trial.trace.with_suffix(".part")
    beside.write_text(json.dumps(trace))
    beside.replace(trial.trace)


def taken(trial: Trial, place: Control) -> dict[str, Any]:
    """Collective, over the processes of the trial. The trace of its steps."""
    cfg = Config.model_validate(trial.cfg)
    os.environ.update(RANK=str(trial.rank), WORLD_SIZE=str(trial.size), LOCAL_RANK=str(trial.rank))
    device = device_here(cfg)
    if device.type == "cuda":
        device = torch.device("cuda", trial.rank)
        torch.cuda.set_device(device)
    # Also of one process, as under Ray: there a task may ask for its rank.
    dist.init_process_group(
        "nccl" if device.type == "cuda" and trial.size > 1 else "gloo",
        init_method=f"file://{trial.folder}/meeting",
        rank=trial.rank,
        world_size=trial.size,
    )
    asked = listen()
    virtual_workers = cfg.SCALE.VIRTUAL_WORKERS or 1
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        world = World.joined(virtual_workers, device)
        job = Job(cfg, run_uri="", launch="", use_gpu=device.type == "cuda", virtual_workers=virtual_workers)
        prepare_torch(cfg, device)
        tend_forks()
        fork_server(cfg.TASK.partition(":")[0])
        run, feed, notes = build(job, world, place, None)
        last = min(trial.steps, run.plan.total_steps)
        observer = Observer(run, feed, last)
        if trial.resumes:
            notes += restore(run, load_file(trial.state, device), "the state after half of the steps")
        if trial.saves:
            observer.at_half = lambda: Path(trial.state).write_bytes(dumps(payload_of(run)))
        seen = SeenFeed(feed, observer)
        stack.callback(seen.close)
        place.follow(run, seen)
        observer.begin()
        seen.start(run.progress)
        train_model(run, seen.task, seen, cast(Recorder, observer))  # all that the loop asks of one
        return observer.trace([*notes, *seen.notes], sorted(asked))


def listen() -> set[str]:
    """Will hold where the user's code asks for its rank, or for how many there are."""
    asked: set[str] = set()
    for name in RANKS:
        original = getattr(dist, name)

        def asks(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            if is_users(frame.f_code.co_filename) and "site-packages" not in frame.f_code.co_filename:
                asked.add(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({name})")
            return original(*args, **kwargs)

        setattr(dist, name, asks)
    return asked


def main(spec: str) -> None:
    """In a new process, which imports meanwhile: it takes the trial once it is told to, and ends with the command.

    That holds the other end of its standard input, and may be killed.
    """
    if not sys.stdin.buffer.readline():
        return

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(EXIT_FAILED)

    threading.Thread(target=watch, daemon=True).start()
    take(Trial(**json.loads(Path(spec).read_text())))
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # ends what it has started, and its folders
    os._exit(0)  # the thread that watches would be waited for


if __name__ == "__main__":
    main(sys.argv[1])
