"""What runs in a worker process of Ray Train, and how it talks to the driver."""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import math
import os
import queue
import signal
import site
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import Any

import torch

import raytrain
from raytrain.cluster.mailbox import Mailbox, current_attempt
from raytrain.engine.determinism import torch_put_back
from raytrain.engine.world import World
from raytrain.errors import failure_of
from raytrain.journal.records import Record
from raytrain.keeper.checkpointer import PendingSave
from raytrain.progress import Progress
from raytrain.storage.forks import at_exit, end_as_at_exit, end_children, handle_signals
from raytrain.storage.paths import joined
from raytrain.storage.pools import when_pools_are_broken
from raytrain.training.control import Control, Restart
from raytrain.training.job import Job, redirect_output, stand_where_the_driver_stands
from raytrain.training.worker import run_job

POST_S = 0.2  # how often rank 0 posts to the driver and asks whether it shall stop
ASK_S = 0.02  # how often the answer is looked for whether a trial shall go on
END_S, LOOK_S = 5.0, 0.02  # so long a part in a run may take to end once others are gone; how often that is looked at
RECENT = 50  # records, of those that are not steps, that wait for the driver


class RayControl(Control):
    """In a Ray Train worker. Two threads keep Ray's latency out of the loop.

    One posts records to the driver and reads its wish to stop (rank 0); one hands checkpoints to
    ray.train.report, which is a barrier of all ranks and takes one report a poll.
    """

    in_a_worker = True

    def __init__(self, launch: str, run_uri: str, rank: int) -> None:
        super().__init__()
        self._mailbox, self._attempt = Mailbox(launch), current_attempt(launch)
        self._run_uri, self._rank = run_uri, rank
        self._lock = threading.Lock()
        self._posted: list[Record] = []
        self._step: Record | None = None
        self._number, self._sent, self._step_sent = 0, 0, None
        self._stop = threading.Event()
        self._ending = threading.Event()
        self._reports: queue.Queue[tuple[PendingSave | None, dict[str, float]] | None] = queue.Queue()
        self._threads = [threading.Thread(target=self._report, name="raytrain-report", daemon=True)]
        if rank == 0:
            self._threads.append(threading.Thread(target=self._post, name="raytrain-post", daemon=True))
        for thread in self._threads:
            thread.start()

    def stop_wished(self) -> bool:
        return self._stop.is_set()

    def goes_on(self, progress: Progress, metrics: dict[str, float]) -> bool:
        if self._mailbox.get("judged") is None:
            return True
        number = f"{self._attempt}-{progress.step}"
        self._mailbox.put("question", {"number": number, "progress": dataclasses.asdict(progress), "metrics": metrics})
        while not self._stop.wait(ASK_S):
            answer = self._mailbox.get("answer")
            if answer is not None and answer["number"] == number:
                return bool(answer["goes_on"])
        return False

    def take_restart(self, num_workers: int) -> Restart | None:
        before, reasons = self._mailbox.get("began") or {}, self._mailbox.get("restart_reasons") or []
        stepped_at, is_planned = self._mailbox.get("stepped_at"), self._mailbox.get("planned") is not None
        self._mailbox.put("began", {"attempt": self._attempt, "num_workers": num_workers})
        for key in ("restart_reasons", "planned"):
            self._mailbox.remove(key)
        if not reasons and before.get("attempt") in (None, self._attempt):
            return None
        return Restart("; ".join(reasons), before.get("num_workers"), stepped_at, is_planned)

    def is_moved(self) -> bool:
        return self._mailbox.get(f"move-{self._attempt}") is not None and self._mailbox.get("stop") is None

    def write(self, record: Record) -> None:
        with self._lock:
            self._number += 1
            numbered = {**record, "number": self._number}
            if record["kind"] == "step":
                self._step = numbered
            else:
                self._posted = [*self._posted, numbered][-RECENT:]

    def saved(self, save: PendingSave | None, metrics: dict[str, float]) -> None:
        self._reports.put((save, metrics))

    def failed(self, failure: dict[str, Any]) -> None:
        """Tell the driver why this rank ends."""
        message = {**failure, "time": time.time(), "attempt": self._attempt}
        self._mailbox.put(f"failure-{self._attempt}-{self._rank}", message)
        self._send()

    def finished(self, outcome: dict[str, Any]) -> None:
        """Hand over what is left, and rank 0's outcome."""
        self._reports.put(None)
        self._ending.set()
        for thread in self._threads:
            thread.join()
        if self._rank == 0:
            self._mailbox.put("outcome", outcome)

    def _post(self) -> None:
        while not self._ending.wait(POST_S):
            self._send()
            if any(self._mailbox.get(key) is not None for key in ("stop", f"stop-{self._attempt}")):
                self._stop.set()
        self._send()

    def _send(self) -> None:
        with self._lock:
            number = self._number
            records = [*self._posted, *([self._step] if self._step else [])]
        if number != self._sent:
            self._mailbox.put("records", {"attempt": self._attempt, "records": records})
            self._sent = number
        step = self.place().get("step")
        if step != self._step_sent:  # records of steps are few; whether a run gets on is not to depend on LOG.EVERY
            self._mailbox.put("step", step)
            if self.stepped_at is not None:  # else what those before have left is still to be read
                self._mailbox.put("stepped_at", self.stepped_at)
            self._step_sent = step

    def _report(self) -> None:
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode

        while (report := self._reports.get()) is not None:
            save, metrics = report
            checkpoint, name = None, save.wait() if save is not None else None
            if name is not None:
                path = joined(self._run_uri, "ckpt", name)
                checkpoint = Checkpoint(path) if "://" in path else Checkpoint.from_directory(path)
            # Anything but a finite float would end the run from within Ray's controller.
            clean = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
            ray.train.report(clean, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)


def stop_on_signal(launch: str) -> None:
    """From now on SIGTERM to this process (a node that goes) wishes a stop of the whole run.

    Not of the workers that are started after these: when one of these dies, Ray ends the others by SIGTERM.
    """
    key = f"stop-{current_attempt(launch)}"

    def wish(number: int, frame: Any) -> None:
        Mailbox(launch).put(key, "SIGTERM to a worker")
        when_pools_are_broken(lambda: os._exit(1))

    handle_signals({signal.SIGTERM: wish})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # blocked where local_cluster has started this process


def leave_signals_to_the_driver() -> None:
    """Where local_cluster has blocked SIGTERM it does nothing; but in what the user's code starts it is not blocked."""
    if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        handle_signals({signal.SIGTERM: lambda *_: None})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def worker_callbacks(job: Job) -> list[Any]:
    """Has each worker stand where the driver stands, before it looks for the others, and stop on a signal.

    Nothing where Ray has moved the hook for it.
    """
    try:
        from ray.train.v2._internal.execution.callback import WorkerCallback
    except ImportError:
        return []

    class AsItBegins(WorkerCallback):
        def after_init_train_context(self) -> None:
            modules_before()
            free_memory()
            stand_where_the_driver_stands(job)
            stop_on_signal(job.launch)

    return [AsItBegins()]


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs in every worker process; `config` holds the Job."""
    import ray.train
    import ray.train.torch

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    job: Job = config["job"]
    rank = ray.train.get_context().get_world_rank()
    control, logs = RayControl(job.launch, job.run_uri, rank), ""
    try:
        logs = redirect_output(job.run_uri, rank)
        stand_where_the_driver_stands(job)
        device = ray.train.torch.get_device() if job.use_gpu else torch.device("cpu")
        world = World.joined(job.virtual_workers, device)
        with torch_put_back():  # for a run that goes on in this process, on another number of them
            outcome = run_job(job, world, control)
    except BaseException as error:
        control.failed(failure_of(error, rank, control.place(), logs))
        raise
    else:
        control.finished(dataclasses.asdict(outcome))
    finally:
        run_exit_functions()


def is_fit(run_uri: str) -> bool:
    """Whether a worker can train here: it sees the run folder. What it needs is imported, by then."""
    import ray.train.torch  # noqa: F401

    return "://" in run_uri or Path(run_uri).is_dir()


def forget_run(wait_s: float = END_S) -> bool:
    """Whether this process is as new, for the run to go on in it on other workers beside it.

    No if its part in the run so far does not end in time, as it does when others are gone or have stopped.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    thread, give_up = get_train_context().execution_context.training_thread_runner, time.monotonic() + wait_s
    while thread.is_running():
        if time.monotonic() > give_up:
            return False
        time.sleep(LOOK_S)
    if torch.distributed.is_initialized():
        if thread.get_error() is not None and torch.distributed.get_backend() == "nccl":
            return False  # it would wait for those that are gone
        torch.distributed.destroy_process_group()
    forget_modules()
    return True


def forget_modules() -> None:
    """The user's own modules will be imported anew: what a run has left in their globals is not the next one's."""
    places = {*sysconfig.get_paths().values(), *site.getsitepackages(), str(Path(raytrain.__file__).parent)}
    installed = tuple(f"{place}{os.sep}" for place in places)
    for name in sys.modules.keys() - modules_before():
        path = getattr(sys.modules[name], "__file__", None) or ""
        if path.endswith(".py") and not path.startswith(installed):
            del sys.modules[name]


@functools.cache
def modules_before() -> frozenset[str]:
    """Those that were there when this was first called, which is before the user's code."""
    gc.freeze()  # they stay: `free_memory` need not look at them, which takes half a second
    return frozenset(sys.modules)


def free_memory() -> None:
    """What a run that went on elsewhere has left here, a model say, goes before the next one is built."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def run_exit_functions() -> None:
    """Ray kills this process, so nothing else would run what is to run at its exit: /tmp/pymp-* would stay.

    In one that goes on to train it is run as well: it has begun nothing else by then.
    """
    at_exit(end_children)
    end_as_at_exit()
