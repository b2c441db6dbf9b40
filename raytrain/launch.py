"""From a Config to a trained run: preflight -> workers -> Result."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from raytrain import board, cluster
from raytrain.cluster import Cluster, Mailbox
from raytrain.config import Config, load_config, with_overrides
from raytrain.control import LocalControl
from raytrain.display import Display, failure_screen
from raytrain.errors import RaytrainError, TrainingError
from raytrain.failure import explains_itself, failure_of, keep_traceback
from raytrain.own_cluster import is_tested
from raytrain.records import Record
from raytrain.resume import is_complete
from raytrain.signals import signals_wish_stop
from raytrain.start import Options, Start, find_start
from raytrain.storage import parent_and_name
from raytrain.task import load_task_class
from raytrain.watchdog import failure_by_hang
from raytrain.worker import Job, device_here, run_job, torch_put_back, train_loop_per_worker
from raytrain.world import World

Show = Callable[[Record], None]

POLL_S = 0.2  # how often records are fetched from the workers
BEREAVED_S = 15.0  # so long workers of a run that has failed may take to die
NOTICE_S = 10.0  # how often a run that waits for resources says so
DIED = (
    "The worker process died without a word. Most often the machine ran out of memory and the system killed it\n"
    "(`dmesg` tells: fewer workers, a smaller batch or LOADER.WORKERS 0 need less), or native code crashed.\n"
    "The same command goes on from the newest checkpoint; with SCALE.MAX_FAILURES the run does so by itself."
)


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
) -> Result:
    """Preflight, then the run; `show` gets its records in place of the console.

    stop:  wishes it, in place of this process's signals.   ahead: the cluster, if it is starting already
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
            status = run_here(start, stop, show) if here else run_on_ray(start, stop, show, ahead)
    finally:
        if display is not None:
            display.close()
        board.take_over(start.run_dir, BEREAVED_S)  # if it failed: the last state it had is saved
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


def run_here(start: Start, stop: threading.Event, show: Show) -> str:
    """The run in this process, without Ray; how it ended."""
    device = device_here(start.cfg)
    job = start.job(0, device.type == "cuda")
    world = World(virtual_workers=job.virtual_workers, device=device)
    control = LocalControl(show, stop)
    try:
        with torch_put_back():
            return run_job(job, world, control).status
    except Exception as error:
        if explains_itself(error):
            raise
        raise as_seen(failure_of(error, 0, control.place(), keep_traceback(error, start.run_dir))) from error


def run_on_ray(start: Start, stop: threading.Event, show: Show, ahead: Cluster | None) -> str:
    """The run on a Ray cluster, joined or started for it; how it ended."""
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
        # Ray would take up from its own list, which may name checkpoints that retention has removed (RAY.md F6, F36).
        start.store.storage.remove_tree("checkpoint_manager_snapshot.json")
        trainer = ray_trainer(job, per_worker, used.is_ours)
        used.wait_for_workers()
        return "stopped" if stop.is_set() else fit(job, trainer, per_worker, stop, show)


def fit(job: Job, trainer: Any, per_worker: dict[str, float], stop: threading.Event, show: Show) -> str:
    """Ray Train's fit in a thread, while this one shows records and passes on the wish to stop."""
    scale, mailbox = job.cfg.SCALE, Mailbox(job.launch)
    assert scale.NUM_WORKERS is not None  # Start.job has settled it
    crowded = cluster.free_workers(per_worker) < scale.NUM_WORKERS
    raised: list[BaseException] = []

    def run_fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run_fit, name="raytrain-fit", daemon=True)
    thread.start()
    inbox, asked, notice_at = Inbox(mailbox, show), False, time.monotonic() + NOTICE_S
    while thread.is_alive():
        thread.join(POLL_S)
        inbox.fetch()
        begun = inbox.last_number > 0
        # Workers that have died wait too before they begin again; that only a controller in that thread can tell.
        waits = getattr(trainer, "awaits_room", crowded and not begun)
        if stop.is_set() and not asked:
            mailbox.put("stop", "signal to the driver")
            inbox.say("stopping", "the state is saved after the step under way; once more to stop at once")
            asked = True
        if asked and (waits or not begun):
            # No worker trains; one that still does finds the wish in the mailbox.
            if hasattr(trainer, "abandon"):  # one whose controller is in that thread, not in an actor
                trainer.abandon()
                thread.join()
                mailbox.clear()
            return "stopped"
        if not waits:
            notice_at = time.monotonic() + NOTICE_S
        elif time.monotonic() > notice_at:
            notice_at += NOTICE_S
            inbox.say("waiting", cluster.wait_reason(per_worker, scale.NUM_WORKERS))
    inbox.fetch()
    outcome, failure = mailbox.get("outcome"), first_failure(mailbox, raised, job)
    mailbox.clear()
    if outcome is not None and not raised:
        return str(outcome["status"])
    raise as_seen(failure) from (raised[0] if raised else None)


class Inbox:
    """What the workers post, shown once each in the order it was written."""

    def __init__(self, mailbox: Mailbox, show: Show) -> None:
        self._mailbox, self._show = mailbox, show
        self._attempt: str | None = None
        self.last_number = 0

    def fetch(self) -> None:
        posted = self._mailbox.get("records") or {"attempt": None, "records": []}
        if self._attempt not in (None, posted["attempt"]):
            self.last_number = 0  # they count anew
            self.say("restart", "the workers were started again after a failure")
        self._attempt = posted["attempt"]
        for record in sorted(posted["records"], key=lambda r: r["number"]):
            if record["number"] > self.last_number:
                self.last_number = record["number"]
                self._show(record)

    def say(self, event: str, message: str) -> None:
        say(self._show, event, message)


def say(show: Show, event: str, message: str) -> None:
    """Shows an event that the driver itself tells of."""
    show({"kind": "event", "time": time.time(), "event": event, "message": message})


def ray_trainer(job: Job, per_worker: dict[str, float], alone: bool) -> Any:
    """Ray Train's TorchTrainer for `job`; its results lie in the run folder, under the run's own name.

    alone: on a cluster that no one else uses
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer_class: Callable[..., Any] = TorchTrainer
    if is_tested():
        from raytrain.lean import LeanTrainer

        trainer_class = partial(LeanTrainer, alone=alone)

    parent, name = parent_and_name(job.run_uri)
    scale = job.cfg.SCALE
    # Two workers that share a GPU cannot use NCCL (RAY.md F26).
    backend = "nccl" if job.use_gpu and scale.GPUS_PER_WORKER >= 1 else "gloo"
    return trainer_class(
        train_loop_per_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend=backend),
        scaling_config=ScalingConfig(
            num_workers=scale.NUM_WORKERS or 1, use_gpu=job.use_gpu, resources_per_worker=per_worker
        ),
        run_config=RunConfig(
            name=name,
            storage_path=parent,
            failure_config=FailureConfig(max_failures=scale.MAX_FAILURES),
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
            from raytrain.control import stop_on_signal

            stop_on_signal(launch_id)

    return [StopOnSignal()]


def first_failure(mailbox: Mailbox, raised: list[BaseException], job: Job) -> dict[str, Any]:
    """The failure to show: the first that a worker told of, since the others often only follow from it."""
    told = sorted((mailbox.get(key) for key in mailbox.keys("failure-")), key=lambda failure: failure["time"])
    told = [failure for failure in told if failure["attempt"] == told[-1]["attempt"]]
    hang = failure_by_hang(job.run_uri)
    if hang is not None and hang["rank"] not in [failure["rank"] for failure in told]:
        return hang
    ends: dict[int, Exception] = getattr(raised[0], "worker_failures", {}) if raised else {}
    silent = sorted(set(ends) - {failure["rank"] for failure in told})
    if told and not silent:
        return told[0]
    text = str(raised[0]) if raised else "the workers ended without saying why"
    rank = silent[0] if silent else None
    if rank is not None:  # what others tell only follows from it
        text = f"{DIED}\n\nRay says: {str(ends[rank]).strip().splitlines()[-1]}"
    logs = f"{job.run_uri}/logs"
    return {"rank": rank, "error": text, "traceback": text, "logs": logs, "exit_status": 1, "expected": False}


def as_seen(failure: dict[str, Any]) -> RaytrainError:
    """The error that a user sees: the message alone where it explains itself, else the failure screen."""
    error = TrainingError(failure["message"] if failure["expected"] else failure_screen(failure))
    error.exit_status = failure["exit_status"]
    return error
