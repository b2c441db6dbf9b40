"""From a Config to a trained run: preflight -> workers -> Result."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
import threading
import warnings
from typing import Any

import torch
import torch.distributed as dist

from raytrain import launcher
from raytrain.cluster.cluster import Cluster
from raytrain.cluster.driver import Show, say
from raytrain.config.load import load_config, with_overrides
from raytrain.config.overrides import workers_words
from raytrain.config.sections import Config
from raytrain.engine.determinism import device_here, torch_put_back
from raytrain.engine.world import World
from raytrain.errors import (
    EXIT_FAILED,
    ConfigError,
    DivergedError,
    PreflightError,
    RaytrainError,
    TrainingError,
    as_seen,
    explains_itself,
    failure_of,
    keep_traceback,
    lost_another,
    masked,
)
from raytrain.hash_seed import FIXED, RANDOM, VARIABLE, hash_seed
from raytrain.journal.display import Display, weights_line
from raytrain.journal.records import Record
from raytrain.keeper import client
from raytrain.keeper.watchdog import failure_by, hangs_here
from raytrain.task import load_task_class
from raytrain.training.control import Judge, LocalControl, never_ends
from raytrain.training.environment import values_of
from raytrain.training.job import Job, redirect_output
from raytrain.training.preflight import BEREAVED_S, LaunchOptions, Start, find_start
from raytrain.training.run_journal import write_failure
from raytrain.training.signals import signals_wish_stop
from raytrain.training.worker import run_job

# The command line fixes it for itself; a script, or a notebook, has begun already.
UNORDERED = (
    "sets of names have another order in each process, also in loader workers and in a run that goes on; if your task "
    f"numbers anything by a set, sort it, or start Python with {VARIABLE}={FIXED}"
)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    status:          "finished", "complete" (it had finished before) or "stopped" (by a signal, state saved)
    run_dir:         the run folder, a path or URI
    metrics:         of the newest checkpoint's evaluation; none after a stop in mid-epoch
    checkpoint:      path of the newest checkpoint, None if there is none
    best_checkpoint: path of the best one by CHECKPOINT.METRIC
    epochs:          that are trained
    changes:         of a run that was complete: how config and code differ from those it was trained with, a line
                     each; where there is one, metrics and checkpoints are not what this config would give
    notes:           what else a user should know then
    weights:         the fingerprint of the newest checkpoint's tensors, "" if there is none: the same of two runs, they
                     have the same bits
    """

    status: str
    run_dir: str
    metrics: dict[str, float]
    checkpoint: str | None
    best_checkpoint: str | None
    epochs: int = 0
    changes: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    weights: str = ""

    def lines(self) -> list[str]:
        """Of a run that was complete, for a terminal: what differs, before what it came to."""
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        before = ", before these changes" if self.changes else ""
        lines = [f"  note: {note}" for note in [*self.notes, *self.changes]]
        lines.append(f"already complete{before}: all {self.epochs} epochs are trained  {metrics}")
        if self.changes:
            lines.append("  to train anew  --extra_tag NAME (beside it), or --resume never --overwrite (in its place)")
        lines += [weights_line(self.weights)] if self.weights else []
        return [*lines, f"  run folder   {self.run_dir}"]


def train(
    cfg: Config | str | os.PathLike[str],
    *,
    num_workers: int | str | None = None,
    address: str | None = None,
    resume: str | os.PathLike[str] = "auto",
    ckpt: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    allow_config_change: bool = False,
    pretrained_model: str | os.PathLike[str] | None = None,
    allow_partial: bool = False,
    quiet: bool = False,
) -> Result:
    """Train as `raytrain train` does: on Ray, or in this process with num_workers 0.

    cfg: a Config, or the path of its YAML file.   num_workers: in place of SCALE.NUM_WORKERS; "2-8": elastic
    address: of a Ray cluster to join, "local" for one of its own; None: the one that RAY_ADDRESS names, or its own
    resume: "auto", "never" or the path of a checkpoint; ckpt: as resume with a path.   quiet: nothing is printed,
    but a warning where the run was complete under another config or code: its metrics are not what was asked for.
    Raises RaytrainError; TrainingError, with the screen a user sees, when a worker fails.
    """
    if not isinstance(cfg, Config):
        cfg = load_config(cfg)
    if num_workers is not None:
        cfg = with_overrides(cfg, workers_words(str(num_workers)))
    if ckpt is not None and resume != "auto":
        raise ConfigError("ckpt and resume both say where to go on; give one of them")
    weights = None if pretrained_model is None else os.fspath(pretrained_model)
    options = LaunchOptions(
        address=address,
        resume=os.fspath(resume if ckpt is None else ckpt),
        overwrite=overwrite,
        allow_config_change=allow_config_change,
        pretrained_model=weights,
        allow_partial=allow_partial,
    )
    result = launch(cfg, options, silent if quiet else None)
    if result.status == "complete" and not quiet:
        print(masked("\n".join(result.lines())), flush=True)
    elif result.changes:
        warnings.warn(masked("\n".join(result.lines())), stacklevel=2)
    return result


def silent(record: Record) -> None:
    """Shows nothing."""


def launch(
    cfg: Config,
    options: LaunchOptions,
    show: Show | None = None,
    stop: threading.Event | None = None,
    starting_cluster: Cluster | None = None,
    judge: Judge = never_ends,
) -> Result:
    """Preflight, then the run; `show` gets its records in place of the console.

    stop: wishes it, in place of this process's signals
    starting_cluster: where it is starting already
    judge: is asked after each evaluation whether the run is to go on: a sweep's, for its trials
    """
    load_task_class(cfg.TASK)
    display = None
    if show is None:
        display = Display()
        show = display.feed
    start = find_start(cfg, options, functools.partial(say, show, "waiting"))
    if start.is_complete:
        return result_of(start, "complete")
    try:
        with contextlib.nullcontext(stop) if stop else signals_wish_stop() as stop:
            if cfg.SCALE.NUM_WORKERS == 0:
                if hash_seed() == RANDOM:
                    say(show, "note", UNORDERED)
                status = run_in_process(start, stop, show, judge)
            else:
                from raytrain.cluster.on_ray import run_on_ray  # imports Ray, which no other run waits for

                status = run_on_ray(start, stop, show, starting_cluster, judge)
    except BaseException as error:
        with contextlib.suppress(RaytrainError):  # what failed is what to tell; the next launch says the rest
            client.take_over(start.run_dir, BEREAVED_S)  # the last state it had is saved
            if isinstance(error, RaytrainError) and error.exit_status == EXIT_FAILED:
                if judge is never_ends:  # a sweep says itself how it goes on
                    tell_way_on(error, start)
                write_failure(start.run_dir, str(error))
        raise
    finally:
        if display is not None:
            display.close()
    client.take_over(start.run_dir, BEREAVED_S)
    return result_of(start, status)


def tell_way_on(error: RaytrainError, start: Start) -> None:
    """The screen of a failed run ends with where the same command goes on, if a checkpoint is there for it."""
    is_screen = isinstance(error, TrainingError) and not isinstance(error, DivergedError)
    if not is_screen or start.options.resume != "auto" or "same command goes on" in str(error).lower():
        return
    if any(entry.manifest for entry in start.store.listed()):
        error.args = (f"{error}\n\nThe same command goes on from the newest checkpoint",)


def result_of(start: Start, status: str) -> Result:
    """What the run folder holds now."""
    newest, _ = start.store.latest_verified()
    best = start.store.best()
    return Result(
        status,
        start.run_dir,
        newest.manifest.metrics_with_nan if newest else {},
        newest.path if newest else None,
        best.path if best else None,
        newest.manifest.progress.epoch if newest else 0,
        start.changes,
        start.notes,
        newest.manifest.weights if newest else "",
    )


def run_in_process(start: Start, stop: threading.Event, show: Show, judge: Judge) -> str:
    """The run in this process, without Ray; how it ended."""
    device = device_here(start.cfg)
    job = start.job(0, device.type == "cuda")
    world = World(virtual_workers=job.virtual_workers, device=device)
    control = LocalControl(show, stop, judge)
    try:
        with torch_put_back():
            return run_job(job, world, control, start.options.datasets).status
    except (Exception, SystemExit) as error:  # a task that calls sys.exit has not finished the run
        if explains_itself(error):
            raise
        raise as_seen(failure_of(error, 0, control.place(), keep_traceback(error, start.run_dir))) from error


def launch_as_one_of_several(cfg: Config, options: LaunchOptions) -> Result:
    """Collective. The run, with this process as one of its workers, which torchrun or Slurm has started.

    Signals wish its end with the state saved.

    Rank 0 shows records on the console; what the others print goes to logs/rank_<r>.log.
    """
    if options.address is not None or options.dashboard:
        flag = "--dashboard" if options.address is None else f"--address {options.address}"
        raise ConfigError(
            f"{flag} is about a Ray cluster, but {launcher.name_here()} has started this process, and its runs do "
            "without Ray; "
            "leave one of them out"
        )
    if restart_count() and options.resume == "never":  # what this launch has saved since is not to be started over
        options = dataclasses.replace(options, resume="auto", overwrite=False)
    meeting, rank, size = next(dist.rendezvous("env://"))
    if cfg.SCALE.ENV:
        take_environment(cfg, meeting, rank)
    load_task_class(cfg.TASK)
    device = local_device(cfg)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=meeting, rank=rank, world_size=size)
    try:
        world = World.joined(size, device)
        start, job = begin_run(cfg, options, world)
        if job is None:
            return result_of(start, "complete")
        world = dataclasses.replace(world, virtual_workers=job.virtual_workers)
        # Not before: while this process waits for one that never comes, no python code could answer a SIGTERM.
        with signals_wish_stop() as stop:
            return result_of(start, run_as_worker(start, job, world, meeting, stop))
    finally:
        dist.destroy_process_group()


def take_environment(cfg: Config, meeting: Any, rank: int) -> None:
    """Rank 0's variables that SCALE.ENV names are this process's too, before its task's module is imported."""
    key = f"raytrain/environment/{restart_count()}"  # the store outlives a start of the workers
    if rank == 0:
        meeting.set(key, json.dumps(values_of(cfg, os.environ)))
    os.environ.update(json.loads(meeting.get(key)))


def fails_first(meeting: Any) -> bool:
    """Whether no other rank has failed before: then this one says why."""
    try:
        return int(meeting.add(f"raytrain/failures/{restart_count()}", 1)) == 1
    except RuntimeError:  # torchrun's store outlives ranks; that of a Slurm step has gone with rank 0, which has failed
        return False


def restart_count() -> int:
    """How often torchrun has started the workers of this launch again (--max_restarts); Slurm never does."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def local_device(cfg: Config) -> torch.device:
    """This process's own GPU by its number on this host, or the CPU."""
    device, number = device_here(cfg), int(os.environ["LOCAL_RANK"])
    if device.type == "cpu":
        return device
    if launcher.name_here() == "Slurm":  # which shows each task its own GPUs alone, if told to (--gpus-per-task)
        number %= max(1, torch.cuda.device_count())
    if number >= torch.cuda.device_count():
        raise PreflightError(
            f"torchrun has started process {number + 1} on this host, which has {torch.cuda.device_count()} GPUs; "
            "use a smaller --nproc_per_node, or --no_gpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def begin_run(cfg: Config, options: LaunchOptions, world: World) -> tuple[Start, Job | None]:
    """Collective. Where the run begins and what is to be done, as rank 0 finds it; no job if the run is complete.

    What rank 0 finds wrong is raised on every rank.
    """
    beginning: tuple[Start, Job | None] | RaytrainError | None = None
    if world.is_first:
        try:
            start = find_start(cfg, options, functools.partial(say, Display().feed, "waiting"))
            beginning = start, None if start.is_complete else start.job(world.size, world.device.type == "cuda")
        except RaytrainError as error:
            beginning = error
    beginning = world.broadcast_object(beginning)
    if isinstance(beginning, RaytrainError):
        raise beginning
    assert beginning is not None  # rank 0 has found one of these
    return beginning


def run_as_worker(start: Start, job: Job, world: World, meeting: Any, stop: threading.Event) -> str:
    """Collective. How the run ended. The rank that fails first shows why, the others only follow."""
    with contextlib.ExitStack() as stack:
        screen = stack.enter_context(os.fdopen(os.dup(2), "w", errors="backslashreplace"))
        if world.is_first:
            display, logs = Display(), ""
            stack.callback(display.close)
            restart = "a worker process failed" if restart_count() else None
            control = LocalControl(display.feed, stop, restart=restart)
        else:
            control, logs = LocalControl(silent, stop), ""
        try:
            if not world.is_first:
                logs = redirect_output(job.run_uri, world.rank)
            return run_job(job, world, control).status
        except (Exception, SystemExit) as error:  # a task that calls sys.exit has not finished the run
            reason = f"raytrain/failure/{restart_count()}"
            if not fails_first(meeting):
                if world.is_first and meeting.check([reason]):
                    write_failure(job.run_uri, meeting.get(reason).decode())
                sys.exit(1)
            if lost_another(error):
                error = TrainingError(
                    f"another worker process has died; rank {world.rank} waited for it. {launcher.name_here()} says "
                    "which one, and by what signal. The same command goes on from the newest checkpoint"
                )
            hung = [failure_by(hang, job.run_uri) for hang in hangs_here(job.run_uri)]
            seen = as_seen((hung or [failure_of(error, world.rank, control.place(), logs)])[0])
            with contextlib.suppress(RaytrainError):
                tell_way_on(seen, start)
            if world.is_first:
                display.close()
            # Here, while a SIGTERM is only a wish: torchrun sends one as soon as it sees a rank die.
            print(f"raytrain: {seen}", file=screen, flush=True)
            seen.was_shown = True
            meeting.set(reason, str(seen))
            if world.is_first:  # else rank 0, which has the journal open
                write_failure(job.run_uri, str(seen))
            raise seen from error
