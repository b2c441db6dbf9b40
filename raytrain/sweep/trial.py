"""A trial of a sweep: an actor of Ray Tune that trains one after another, each in a run folder of its own.

What a trial has reached is a function of its `Lineage` and the number of epochs. So results that are known already,
from before the sweep was killed, are told again and not trained again, and a trial that has lost its checkpoints
comes to the same bits from the start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.tune import Trainable

from raytrain.cluster import ray_worker
from raytrain.cluster.mailbox import Mailbox
from raytrain.config.sections import Config
from raytrain.errors import DivergedError, RaytrainError, TaskError, masked
from raytrain.journal.run_folder import run_dir_of
from raytrain.keeper import client
from raytrain.launch import launch, silent
from raytrain.progress import Progress
from raytrain.storage.checkpoint import PAYLOAD, write_checkpoint
from raytrain.storage.lock import JOURNAL
from raytrain.storage.storage import Storage, open_storage
from raytrain.storage.store import FOLDER, Store, verified
from raytrain.sweep.datasets import unpickled
from raytrain.sweep.lineage import RESUME_POINT, Lineage, Params, ResumePoint
from raytrain.sweep.quota import share_of
from raytrain.sweep.trial_state import evaluated, is_of, newest_of
from raytrain.task import load_task_class
from raytrain.training import job
from raytrain.training.environment import Environment
from raytrain.training.preflight import BEREAVED_S, LaunchOptions

DIVERGED = "diverged"  # why a trial failed whose losses, gradients or weights did not stay finite
MAX_PROCESS_DEATHS = 3  # restarts of a trial whose process has died
POLL_S = 0.2  # how often it is looked whether the sweep shall stop
LEAVE_S = 60.0  # so long a run may take to save its state and end


@dataclasses.dataclass(frozen=True)
class TrialSettings:
    """What all trials of a sweep are told.

    cfg:      the sweep's, with NUM_WORKERS as it is for every trial: 0 where the actor itself trains
    metric:   of the evaluation, by which trials are compared
    known:    results by (trial, Lineage.key, epoch), from earlier launches of the sweep
    launch:   names the mailbox in which the wish to stop is put
    steps_per_epoch: of a trial, by the sweep's config
    datasets: for every trial, pickled; None where each is to build its own
    cwd, search_path, environment: of the driver, as in job.Job
    """

    cfg: Config
    metric: str
    mode: str
    known: dict[tuple[int, str, int], dict[str, Any]]
    launch: str
    steps_per_epoch: int
    datasets: bytes | None
    cwd: str
    search_path: tuple[str, ...]
    environment: Environment


class TrainingThread:
    """A run in a thread, which after each evaluation waits until `go_on` or `end`."""

    def __init__(self, cfg: Config, options: LaunchOptions) -> None:
        self.stop = threading.Event()
        self._messages: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._train, args=(cfg, options), name="raytrain-trial", daemon=True)
        self._thread.start()

    def _train(self, cfg: Config, options: LaunchOptions) -> None:
        try:
            result = launch(cfg, options, show=silent, stop=self.stop, judge=self._judge)
            self._messages.put(("ended", result.status))
        except BaseException as error:
            self._messages.put(("failed", error))

    def _judge(self, progress: Progress, metrics: dict[str, float]) -> bool:
        self._messages.put(("result", (progress, metrics)))
        return self._answers.get()

    def next(self) -> tuple[str, Any]:
        """("result", (Progress, metrics)), ("ended", status) or ("failed", exception), once it is so."""
        return self._messages.get()

    def go_on(self) -> None:
        self._answers.put(True)

    def end(self) -> None:
        """Returns once the run has ended, with its state saved."""
        self.stop.set()
        self._answers.put(False)
        self._thread.join(LEAVE_S)


class TrialActor(Trainable):
    """One result a step: what the evaluation after some more epochs gives, known or trained.

    A result holds: epoch, step, value (None: not finite), score (value, or the worst there is), metrics, seconds (of
    training, of this trial, so far), key (Lineage.key), and `ended` with the last one: "done", "failed" (with `error`)
    or "interrupted". One that failed since it diverged holds `why` and a score too.
    """

    def setup(self, config: Params, settings: TrialSettings) -> None:  # type: ignore[override]  # see tune.with_parameters
        self.settings = settings
        ray_worker.leave_signals_to_the_driver()
        job.stand_where_the_driver_stands(settings)
        self.stop_requested = threading.Event()
        self.training: TrainingThread | None = None
        threading.Thread(target=self._wait_for_stop, name="raytrain-wish", daemon=True).start()
        self._begin(config)

    def reset_config(self, new_config: Params) -> bool:
        self.cleanup()
        self._begin(new_config)
        return True

    def _begin(self, params: Params) -> None:
        self.number, self.lineage, self.epoch, self.seconds = int(self.trial_id), Lineage(params), 0, 0.0
        self.source: str | None = None
        self.waits = False

    def _wait_for_stop(self) -> None:
        mailbox = Mailbox(self.settings.launch)
        while ray.is_initialized() and not self.stop_requested.wait(POLL_S):
            if mailbox.get("stop") is not None:
                self.stop_requested.set()
        if self.training is not None:
            self.training.stop.set()

    def step(self) -> dict[str, Any]:
        began = time.monotonic()
        try:
            known = self.settings.known.get((self.number, self.lineage.key(self.next_epoch), self.next_epoch))
            if self.training is None and known is not None:
                return self._result(known["epoch"], known["step"], known["metrics"], known["seconds"])
            if self.training is None:
                evaluation = self._start()
                if evaluation is not None:
                    return self._result(evaluation["epoch"], evaluation["step"], evaluation["metrics"], self.seconds)
            return self._next_result(began)
        except (Exception, SystemExit) as error:  # a task may call sys.exit
            return self._failure(error)

    @property
    def next_epoch(self) -> int:
        """After which the next evaluation comes."""
        last = self.num_epochs
        return next((e for e in range(self.epoch + 1, last) if self.settings.cfg.EVAL.due(e, last)), last)

    @property
    def num_epochs(self) -> int:
        return int(self.lineage.config(self.settings.cfg, self.number).OPTIMIZATION.NUM_EPOCHS)

    def _start(self) -> dict[str, Any] | None:
        """Begin to train from where the run folder stands; or the result that is found there."""
        cfg = self.lineage.config(self.settings.cfg, self.number)
        run_dir = run_dir_of(cfg)
        storage = open_storage(run_dir)
        client.take_over(run_dir, BEREAVED_S)  # what the training before a pause still writes and removes
        newest = newest_of(storage)
        if newest is None or not is_of(cfg, self.lineage.base, newest):
            Store(storage, cfg.CHECKPOINT, f"{self.settings.launch}-{time.time_ns()}").supersede(Progress(-1))
            if not self._take_source(cfg, storage):
                storage.remove_tree(JOURNAL)  # of another lineage, and it would tell of checkpoints that are gone
        elif self.epoch < newest.manifest.progress.epoch:
            since = self.lineage.phases[-1][0] if self.lineage.phases else 0
            evaluation = evaluated(storage, self.next_epoch, since)
            if evaluation is not None:
                return evaluation
        job.redirect_output(run_dir, 0)
        if self.stop_requested.is_set():
            raise InterruptedError
        pickled = self.settings.datasets
        load_task_class(cfg.TASK)
        if differing := self.settings.environment.differing(os.environ):
            Mailbox(self.settings.launch).put("environment", differing)
        datasets, environment = partial(unpickled, pickled) if pickled else None, self.settings.environment
        share = share_of(self.number, self.settings.launch, cfg.SCALE.MIN_WORKERS) if cfg.SCALE.MIN_WORKERS else None
        self.training = TrainingThread(cfg, LaunchOptions(datasets=datasets, environment=environment, share=share))
        if self.stop_requested.is_set():
            self.training.stop.set()
        return None

    def _take_source(self, cfg: Config, storage: Storage) -> bool:
        """Whether the checkpoint that this trial was cloned from is its own now; else it comes there from the start."""
        if self.source is None:
            return False
        source, name = open_storage(self.source), f"{FOLDER}/checkpoint_epoch_{self.epoch}"
        with contextlib.suppress(RaytrainError, OSError):  # retention may take it away meanwhile
            saved = verified(source, name.removeprefix(f"{FOLDER}/"))
            if is_of(cfg, self.lineage.base, saved):
                write_checkpoint(storage, name, source.read_bytes(f"{name}/{PAYLOAD}"), saved.manifest)
                return True
        return False

    def _next_result(self, began: float) -> dict[str, Any]:
        assert self.training is not None
        while True:
            if self.waits:
                self.training.go_on()
                self.waits = False
            kind, content = self.training.next()
            if kind == "failed":
                raise content
            if kind == "ended":
                return {"ended": "interrupted", "done": True, "epoch": self.epoch}
            self.waits = True
            progress, metrics = content
            if progress.epoch > self.epoch:
                break
        if progress.epoch >= self.num_epochs:
            self._finish()
        seconds = self.seconds + time.monotonic() - began
        return self._result(progress.epoch, progress.step, metrics, seconds)

    def _finish(self) -> None:
        """Let the run come to its end: its last pictures and records are still to be written."""
        assert self.training is not None
        training, self.training, self.waits = self.training, None, False
        training.go_on()
        kind, content = training.next()
        if kind == "failed":
            raise content

    def _result(self, epoch: int, step: int, metrics: dict[str, Any], seconds: float) -> dict[str, Any]:
        self.epoch, self.seconds = epoch, seconds
        if self.settings.metric not in metrics:
            raise TaskError(
                f"TUNE.METRIC is {self.settings.metric!r}, which the evaluation does not give; it gives "
                f"{', '.join(metrics) or 'nothing'}. Set TUNE.METRIC to one of these"
            )
        value = metrics[self.settings.metric]
        finite = value is not None and abs(value) < float("inf")
        done = epoch >= self.num_epochs
        return {
            "epoch": epoch,
            "step": step,
            "value": value if finite else None,
            "score": value if finite else self.worst,
            "metrics": metrics,
            "seconds": seconds,
            "key": self.lineage.key(epoch),
            **({"done": True, "ended": "done"} if done else {}),
        }

    @property
    def worst(self) -> float:
        return -1e30 if self.settings.mode == "max" else 1e30

    def _failure(self, error: Exception | SystemExit) -> dict[str, Any]:
        self.cleanup()
        if isinstance(error, InterruptedError):
            return {"ended": "interrupted", "done": True, "epoch": self.epoch}
        expected = isinstance(error, RaytrainError)
        text = str(error) if expected else "".join(traceback.format_exception(error))
        failed = {"ended": "failed", "done": True, "epoch": self.epoch, "error": masked(text)}
        if not isinstance(error, DivergedError):
            return failed
        # To the schedulers as if its next evaluation had been the worst there is.
        step = self.next_epoch * self.settings.steps_per_epoch
        return {**failed, "epoch": self.next_epoch, "step": step, "score": self.worst, "why": DIVERGED}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Where this trial stands, which pauses here; its state is in its run folder, and another process may go on."""
        self.cleanup()
        resume_point = ResumePoint(self.number, self.lineage, self.epoch, self.seconds)
        (Path(checkpoint_dir) / RESUME_POINT).write_bytes(resume_point.to_json())

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]  # a folder, as it was saved
        resume_point = ResumePoint.of_json((Path(checkpoint_dir) / RESUME_POINT).read_bytes())
        self.epoch, self.seconds = resume_point.epoch, resume_point.seconds
        self.source = run_dir_of(resume_point.lineage.config(self.settings.cfg, resume_point.trial))
        self.lineage = resume_point.lineage.changed(self.epoch, self.config)

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """In a folder that goes with the cluster, where Ray would make one that a killed process leaves."""
        return super().save(checkpoint_dir or str(Path(self.logdir) / "saved"))

    def stop(self) -> None:
        super().stop()
        ray_worker.run_exit_functions()

    def cleanup(self) -> None:
        training, self.training = self.training, None
        self.waits = False
        if training is not None:
            training.end()
