"""From a Config to a trained run: preflight -> workers -> Result."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from raytrain.cluster import cluster
from raytrain.cluster.budget import Budget
from raytrain.cluster.cluster import Cluster, Mailbox
from raytrain.cluster.driver import Fit, Inbox, Show, say
from raytrain.cluster.local_cluster import is_tested
from raytrain.config.load import load_config, with_overrides
from raytrain.config.sections import Config
from raytrain.engine.determinism import device_here, torch_put_back
from raytrain.engine.world import World
from raytrain.errors import DivergedError, PreflightError, RaytrainError, TrainingError
from raytrain.failure import explains_itself, failure_of, keep_traceback
from raytrain.journal.display import Display, failure_screen
from raytrain.journal.records import Record
from raytrain.keeper import client
from raytrain.storage.lock import locked
from raytrain.storage.paths import parent_and_name
from raytrain.storage.storage import open_storage
from raytrain.task import load_task_class
from raytrain.training.control import Judge, LocalControl, never_ends, signals_wish_stop
from raytrain.training.job import Job
from raytrain.training.preflight import Options, Start, find_start
from raytrain.training.resume import is_complete
from raytrain.training.worker import run_job, train_loop_per_worker

BEREAVED_S = 15.0  # so long workers of a run that has failed may take to die


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    status:          "finished", "complete" (it had finished before) or "stopped" (by a signal, state saved)
    run_dir:         the run folder, a path or URI
    metrics:         of the newest evaluation
    checkpoint:      path of the newest checkpoint, None if there is none
    best_checkpoint: path of the best one by CHECKPOINT.METRIC
    """

    status: str
    run_dir: str
    metrics: dict[str, float]
    checkpoint: str | None
    best_checkpoint: str | None


def train(
    cfg: Config | str | os.PathLike[str],
    *,
    num_workers: int | None = None,
    address: str | None = None,
    resume: str | os.PathLike[str] = "auto",
    overwrite: bool = False,
    allow_config_change: bool = False,
    pretrained: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> Result:
    """Train as `raytrain train` does: on Ray, or in this process with num_workers 0.

    cfg: a Config, or the path of its YAML file.   num_workers: in place of SCALE.NUM_WORKERS
    resume: "auto", "never" or the path of a checkpoint.   quiet: nothing is printed
    Raises RaytrainError; TrainingError, with the screen a user sees, when a worker fails.
    """
    if not isinstance(cfg, Config):
        cfg = load_config(cfg)
    if num_workers is not None:
        cfg = with_overrides(cfg, ["SCALE.NUM_WORKERS", str(num_workers)])
    weights = None if pretrained is None else os.fspath(pretrained)
    options = Options(address, os.fspath(resume), overwrite, allow_config_change, weights)
    return launch(cfg, options, silent if quiet else None)


def silent(record: Record) -> None:
    """Shows nothing."""


def launch(
    cfg: Config,
    options: Options,
    show: Show | None = None,
    stop: threading.Event | None = None,
    ahead: Cluster | None = None,
    judge: Judge = never_ends,
) -> Result:
    """Preflight, then the run; `show` gets its records in place of the console.

    stop:  wishes it, in place of this process's signals.   ahead: the cluster, if it is starting already
    judge: is asked after each evaluation whether the run is to go on: a sweep's, for its trials
    """
    load_task_class(cfg.TASK)
    start = find_start(cfg, options)
    if options.resume == "auto" and is_complete(start.origin, cfg.OPTIMIZATION.NUM_EPOCHS):
        return result_of(start, "complete")
    display = None
    if show is None:
        display = Display()
        show = display.feed
    try:
        with contextlib.nullcontext(stop) if stop else signals_wish_stop() as stop:
            here = cfg.SCALE.NUM_WORKERS == 0
            status = run_here(start, stop, show, judge) if here else run_on_ray(start, stop, show, ahead, judge)
    except BaseException:
        with contextlib.suppress(PreflightError):  # what failed is what to tell; the next launch says the rest
            client.take_over(start.run_dir, BEREAVED_S)  # the last state it had is saved
        raise
    finally:
        if display is not None:
            display.close()
    client.take_over(start.run_dir, BEREAVED_S)
    return result_of(start, status)


def result_of(start: Start, status: str) -> Result:
    """What the run folder holds now."""
    newest, _ = start.store.latest_verified()
    best = start.store.best()
    return Result(
        status,
        start.run_dir,
        newest.manifest.found if newest else {},
        newest.path if newest else None,
        best.path if best else None,
    )


def run_here(start: Start, stop: threading.Event, show: Show, judge: Judge) -> str:
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


def run_on_ray(start: Start, stop: threading.Event, show: Show, ahead: Cluster | None, judge: Judge) -> str:
    """The run on a Ray cluster, joined or started for it; how it ended."""
    with locked(open_storage(start.run_dir)):  # or Ray would stumble over what another run is writing there
        pass
    with contextlib.ExitStack() as stack:
        options = start.options
        used = ahead or stack.enter_context(
            cluster.starting(options.address, dashboard=options.dashboard, scale=start.cfg.SCALE)
        )
        try:
            used.connect()
        except SystemExit:  # Ray's own answer to a SIGTERM while it starts
            return "stopped"
        if used.dashboard_url:
            say(show, "dashboard", f"http://{used.dashboard_url}")
        num_workers, use_gpu = cluster.resolve_workers(start.cfg.SCALE)
        job = start.job(num_workers, use_gpu)
        per_worker = cluster.resources_per_worker(job.cfg.SCALE, use_gpu)
        cluster.check_resources(num_workers, per_worker)
        cluster.check_reachable(start.run_dir)
        used.wait_for_workers()
        return "stopped" if stop.is_set() else train_on_ray(job, used, per_worker, stop, show, judge)


def train_on_ray(
    job: Job, used: Cluster, per_worker: dict[str, float], stop: threading.Event, show: Show, judge: Judge
) -> str:
    """The run in worker processes of a cluster, on others when their nodes are taken away; how it ended."""
    mailbox, budget = Mailbox(job.launch), Budget(job.cfg.SCALE.MAX_FAILURES)
    inbox = Inbox(mailbox, show, judge)
    try:
        while True:
            # Ray would take up from its own list, which may name checkpoints that retention has removed (RAY.md F6).
            open_storage(job.run_uri).remove_tree("checkpoint_manager_snapshot.json")
            trainer = ray_trainer(job, per_worker, used.is_ours, budget, mailbox)
            fit = Fit(job, trainer, used, per_worker, inbox)
            status = fit.follow(stop)
            if fit.failure is not None:
                raise as_seen(fit.failure) from fit.raised
            if status != "stopped" or stop.is_set() or not fit.was_moved:
                return status
            mailbox.remove("outcome")
            inbox.expect()
    finally:
        mailbox.clear()


def ray_trainer(job: Job, per_worker: dict[str, float], alone: bool, budget: Budget, mailbox: Mailbox) -> Any:
    """Ray Train's TorchTrainer for `job`; its results lie in the run folder, under the run's own name.

    alone:   on a cluster that no one else uses
    budget, mailbox: see lean.LeanTrainer; where Ray's own trainer has to do, it counts all failures alike
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer_class: Callable[..., Any] = TorchTrainer
    config_class: Callable[..., Any] = TorchConfig
    if is_tested():
        from raytrain.cluster.controller import LeanTrainer

        trainer_class = partial(LeanTrainer, alone=alone, budget=budget, mailbox=mailbox)
        if alone:
            from raytrain.cluster.rendezvous import MeetingByFile

            config_class = MeetingByFile

    parent, name = parent_and_name(job.run_uri)
    scale = job.cfg.SCALE
    # Two workers that share a GPU cannot use NCCL (RAY.md F26).
    backend = "nccl" if job.use_gpu and scale.GPUS_PER_WORKER >= 1 else "gloo"
    return trainer_class(
        train_loop_per_worker,
        train_loop_config={"job": job},
        torch_config=config_class(backend=backend),
        scaling_config=ScalingConfig(
            num_workers=scale.NUM_WORKERS or 1, use_gpu=job.use_gpu, resources_per_worker=per_worker
        ),
        run_config=RunConfig(
            name=name,
            storage_path=parent,
            failure_config=FailureConfig(max_failures=scale.MAX_FAILURES or 0),
            callbacks=worker_callbacks(job.launch),
            logging_config=LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]
        ),
    )


def worker_callbacks(launch_id: str) -> list[Any]:
    """Lets a SIGTERM to a worker process stop the run with its state saved; nothing where Ray has moved the hook."""
    try:
        from ray.train.v2._internal.execution.callback import WorkerCallback
    except ImportError:
        return []

    class StopOnSignal(WorkerCallback):
        def after_init_train_context(self) -> None:
            from raytrain.training.control import stop_on_signal

            stop_on_signal(launch_id)

    return [StopOnSignal()]


@contextlib.contextmanager
def explained(what: str, run_dir: str) -> Iterator[None]:
    """An exception of the task is told as one of training is: `what` failed, in which lines of the user's."""
    try:
        yield
    except Exception as error:
        if explains_itself(error):
            raise
        raise as_seen(failure_of(error, 0, {"what": what}, keep_traceback(error, run_dir))) from error


def as_seen(failure: dict[str, Any]) -> RaytrainError:
    """The error that a user sees: the message alone where it explains itself, else the failure screen."""
    text = failure["message"] if failure["expected"] else failure_screen(failure)
    kind = DivergedError if failure.get("diverged") else TrainingError
    error = kind("\n\n".join(filter(None, [text, failure.get("given_up")])))
    error.exit_status = failure["exit_status"]
    return error
