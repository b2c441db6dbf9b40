"""The run in processes that torchrun has started: the same loop, without Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
from typing import Any

import torch
import torch.distributed as dist

from raytrain.config.sections import Config
from raytrain.engine.determinism import device_here
from raytrain.engine.world import World
from raytrain.errors import ConfigError, PreflightError, RaytrainError, TrainingError
from raytrain.failure import failure_of, lost_another
from raytrain.journal.display import Display
from raytrain.keeper.watchdog import failure_by, hangs_here
from raytrain.launch import Result, as_seen, result_of, silent
from raytrain.task import load_task_class
from raytrain.training.control import LocalControl, signals_wish_stop
from raytrain.training.job import Job, redirect_output
from raytrain.training.preflight import Options, Start, find_start
from raytrain.training.resume import is_complete
from raytrain.training.worker import run_job


def launch_here(cfg: Config, options: Options) -> Result:
    """Collective. The run, with this process as one of its workers; signals wish its end with the state saved.

    Rank 0 shows records on the console; what the others print goes to logs/rank_<r>.log.
    """
    if options.address is not None or options.dashboard:
        flag = "--dashboard" if options.address is None else f"--address {options.address}"
        raise ConfigError(
            f"{flag} is about a Ray cluster, but torchrun has started this process, and its runs do without Ray; "
            "leave one of them out"
        )
    if restarts() and options.resume == "never":  # what this launch has saved since is not to be started over
        options = dataclasses.replace(options, resume="auto", overwrite=False)
    load_task_class(cfg.TASK)
    device = local_device(cfg)
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    try:
        world = World.joined(size, device)
        start, job = begun(cfg, options, world)
        if job is None:
            return result_of(start, "complete")
        world = dataclasses.replace(world, virtual_workers=job.virtual_workers)
        # Not before: while this process waits for one that never comes, no python code could answer torchrun's SIGTERM.
        with signals_wish_stop() as stop:
            return result_of(start, run_as_worker(job, world, store, stop))
    finally:
        dist.destroy_process_group()


def restarts() -> int:
    """How often torchrun has started the workers of this launch again (--max_restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def local_device(cfg: Config) -> torch.device:
    """This process's own GPU by its number on this host, or the CPU."""
    device, number = device_here(cfg), int(os.environ["LOCAL_RANK"])
    if device.type == "cpu":
        return device
    if number >= torch.cuda.device_count():
        raise PreflightError(
            f"torchrun has started process {number + 1} on this host, which has {torch.cuda.device_count()} GPUs; "
            "use a smaller --nproc_per_node, or --no_gpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def begun(cfg: Config, options: Options, world: World) -> tuple[Start, Job | None]:
    """Collective. Where the run begins and what is to be done, as rank 0 finds it; no job if the run is complete.

    What rank 0 finds wrong is raised on every rank.
    """
    found: tuple[Start, Job | None] | RaytrainError | None = None
    if world.is_first:
        try:
            start = find_start(cfg, options)
            complete = options.resume == "auto" and is_complete(start.origin, cfg.OPTIMIZATION.NUM_EPOCHS)
            found = start, None if complete else start.job(world.size, world.device.type == "cuda")
        except RaytrainError as error:
            found = error
    found = world.broadcast_object(found)
    if isinstance(found, RaytrainError):
        raise found
    assert found is not None  # rank 0 has found one of these
    return found


def run_as_worker(job: Job, world: World, store: Any, stop: threading.Event) -> str:
    """Collective. How the run ended. The rank that fails first shows why, the others only follow."""
    with contextlib.ExitStack() as stack:
        screen = stack.enter_context(os.fdopen(os.dup(2), "w", errors="backslashreplace"))
        if world.is_first:
            display, logs = Display(), ""
            stack.callback(display.close)
            control = LocalControl(display.feed, stop)
        else:
            control, logs = LocalControl(silent, stop), ""
        try:
            if not world.is_first:
                logs = redirect_output(job.run_uri, world.rank)
            return run_job(job, world, control).status
        except Exception as error:
            if store.add(f"raytrain/failures/{restarts()}", 1) > 1:  # torchrun keeps it, so it outlives ranks
                sys.exit(1)
            if lost_another(error):
                error = TrainingError(
                    f"another worker process has died; rank {world.rank} waited for it. torchrun says below which one, "
                    "and by what signal. The same command goes on from the newest checkpoint"
                )
            hung = [failure_by(hang, job.run_uri) for hang in hangs_here(job.run_uri)]
            seen = as_seen((hung or [failure_of(error, world.rank, control.place(), logs)])[0])
            if world.is_first:
                display.close()
            # Here, while a SIGTERM is only a wish: torchrun sends one as soon as it sees a rank die.
            print(f"raytrain: {seen}", file=screen, flush=True)
            seen.told = True
            raise seen from error
