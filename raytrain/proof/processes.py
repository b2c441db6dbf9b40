"""The processes of trials: started, waited for, and all gone at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raytrain.config.load import with_overrides
from raytrain.config.sections import Config
from raytrain.errors import EXIT_FAILED, RaytrainError
from raytrain.hash_seed import VARIABLE, hash_seed
from raytrain.keeper.watchdog import answers_dump, calls_of
from raytrain.proof.trial import Trial, take_in_fork
from raytrain.proof.ways import HASH_SEED, RESUMED, STRAIGHT, Way
from raytrain.storage.processes import DUMP
from raytrain.storage.scratch import ScratchFolder, remove_abandoned

LEAST_SLOTS, MOST_SLOTS = 2, 4  # processes at a time: one for each core, but each has the data set and the model
POLL_S = 0.02
LEAST_S, TIMES = 60.0, 20  # a way may take so many times as long as straight did, or so long
STACKS_S = 2.0  # for a process to write its stacks
ENDING_S = 5.0  # for processes that were killed to be gone
TAIL = 10  # lines of what a process printed that has died


class Process:
    """One process of a trial."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    @property
    def pid(self) -> int:
        raise NotImplementedError

    def is_over(self) -> bool:
        raise NotImplementedError

    def trace(self) -> dict[str, Any]:
        """What it has left; a failure if that is nothing."""
        with contextlib.suppress(FileNotFoundError):
            trace: dict[str, Any] = json.loads(self.trial.trace.read_text())
            return trace
        printed = self.trial.output.read_text(errors="replace").splitlines() if self.trial.output.exists() else []
        told = "\n".join(["its process has died without a word of its own; it printed:", *printed[-TAIL:]])
        return {"failed": told, "status": EXIT_FAILED, "follows": False}

    def where(self) -> str:
        """The user's call in which a process is that does not end; nothing if that is not known."""
        if self.is_over() or not answers_dump(self.pid):
            return ""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, DUMP)
        until = time.monotonic() + STACKS_S
        while time.monotonic() < until:
            time.sleep(POLL_S)
            calls = calls_of(["", self.trial.stacks.read_text(errors="replace")], 0)
            if calls:
                return calls[0]
        return ""

    def kill(self) -> None:
        """Also what it has started; returns when it is gone."""
        if self.is_over():  # its number may be another's by now; what it had started has ended with it
            return
        for send in (os.killpg, os.kill):  # it may not lead its group yet
            with contextlib.suppress(ProcessLookupError):
                send(self.pid, signal.SIGKILL)
        gone_by = time.monotonic() + ENDING_S
        while not self.is_over() and time.monotonic() < gone_by:
            time.sleep(POLL_S)


class ForkedProcess(Process):
    """A copy of this one, which has imported torch already, and nothing of the task's."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(trial)
        self._process = multiprocessing.get_context("fork").Process(target=take_in_fork, args=(trial,))
        self._process.start()

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    def is_over(self) -> bool:
        return not self._process.is_alive()


class NewProcess(Process):
    """One with a hash seed of its own, which is drawn as Python starts; it takes its trial once it is told to."""

    def __init__(self, trial: Trial, seed: str) -> None:
        super().__init__(trial)
        spec = Path(trial.folder) / "trial.json"
        spec.write_text(json.dumps(dataclasses.asdict(trial)))
        environment = {**os.environ, VARIABLE: seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "raytrain.proof.trial", str(spec)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)

    def begin(self) -> None:
        assert self._process.stdin is not None, "it is a pipe"
        with contextlib.suppress(BrokenPipeError):  # it has died; that is told when it is looked for
            self._process.stdin.write(b"begin\n")
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_over(self) -> bool:
        return self._process.poll() is not None


class Trials:
    """Starts the processes of ways, a few at a time, and gives their traces.

    timeout_s: how long a way may take; None: TIMES as long as straight took, and LEAST_S
    """

    def __init__(
        self, cfg: Config, steps: int, virtual_workers: int, folder: Path, timeout_s: float | None = None
    ) -> None:
        self._cfg, self._steps, self._virtual_workers, self._folder = cfg, steps, virtual_workers, folder
        self._slots = min(MOST_SLOTS, max(LEAST_SLOTS, len(os.sched_getaffinity(0))))
        self._timeout_s, self._straight_s = timeout_s, 0.0
        self._running: dict[Way, Sequence[Process]] = {}
        self._began_s: dict[Way, float] = {}
        self._prepared: dict[Way, NewProcess] = {}

    def straight(self, following: Sequence[Way]) -> dict[str, Any]:
        """The trace of the steps, taken as a run takes them; its error, if it fails.

        Nothing else of the task's runs meanwhile, which may leave files. Those of `following` that need a new process
        have it started already.
        """
        way = Way(STRAIGHT, STRAIGHT)
        self._start(way)
        for each in following:
            if each.kind == HASH_SEED:
                self._prepared[each] = NewProcess(self._trial(each), "2" if hash_seed() == "1" else "1")
        while not self._is_over(way):
            time.sleep(POLL_S)
        self._straight_s = time.monotonic() - self._began_s[way]
        [trace] = self._take(way)
        if "failed" in trace:
            error = RaytrainError(trace["failed"])
            error.exit_status = trace["status"]
            raise error
        return trace

    def taken(self, ways: Sequence[Way]) -> Iterator[tuple[Way, list[dict[str, Any]]]]:
        """Each way with the traces of its processes, as they come."""
        waiting = list(ways)
        while waiting or self._running:
            while waiting and self._has_room(waiting[0]):
                self._start(waiting.pop(0))
            for way in list(self._running):
                if self._is_over(way):
                    yield way, self._take(way)
                elif time.monotonic() > self._began_s[way] + self._most_s:
                    yield way, self._given_up(way)
            time.sleep(POLL_S)

    def end(self) -> None:
        """Whatever still runs is killed."""
        for process in (
            *self._prepared.values(),
            *(each for processes in self._running.values() for each in processes),
        ):
            process.kill()
        self._running.clear()

    def _has_room(self, way: Way) -> bool:
        busy = sum(len(processes) for processes in self._running.values())
        return not busy or busy + way.workers <= self._slots

    @property
    def _most_s(self) -> float:
        return self._timeout_s or max(LEAST_S, TIMES * self._straight_s)

    def _given_up(self, way: Way) -> list[dict[str, Any]]:
        """The traces of a way that does not end: where each of its processes is."""
        told = f"not done after {self._most_s:.0f} s, where straight took {self._straight_s:.0f} s"
        for process in self._running[way]:
            where = process.where()
            if where:
                told += f"; rank {process.trial.rank} is in {where}"
        self._take(way)
        return [{"failed": told, "status": EXIT_FAILED, "follows": False}]

    def _start(self, way: Way) -> None:
        self._began_s[way] = time.monotonic()
        if way in self._prepared:
            prepared = self._prepared.pop(way)
            self._running[way] = [prepared]
            prepared.begin()
            return
        trial, processes = self._trial(way), list[Process]()
        self._running[way] = processes  # before the first is there: an interrupt may come between them
        for rank in range(way.workers):
            processes.append(ForkedProcess(dataclasses.replace(trial, rank=rank)))

    def _trial(self, way: Way) -> Trial:
        folder = self._folder / f"{way.kind}_{way.workers}"
        folder.mkdir()
        words = ["SCALE.NUM_WORKERS", way.workers, "SCALE.VIRTUAL_WORKERS", self._virtual_workers]
        words += ["LOADER.WORKERS", way.loaders]
        if self._cfg.OPTIMIZATION.COMPILE:
            words += ["OPTIMIZATION.CUDA_GRAPHS", "false", "OPTIMIZATION.COMPILE", "false"]
        return Trial(
            cfg=with_overrides(self._cfg, [str(word) for word in words]).to_tree(),
            steps=self._steps,
            state=str(self._folder / "state.pth"),
            folder=str(folder),
            size=way.workers,
            resumes=way.kind == RESUMED,
            saves=way.kind == STRAIGHT,
            search_path=tuple(sys.path),
        )

    def _is_over(self, way: Way) -> bool:
        """All its processes have ended, or one has failed: then nobody need wait for the others."""
        over = [process for process in self._running[way] if process.is_over()]
        return len(over) == len(self._running[way]) or any("failed" in process.trace() for process in over)

    def _take(self, way: Way) -> list[dict[str, Any]]:
        processes = self._running[way]
        for process in processes:
            process.kill()  # one that waits for another that has failed
        del self._running[way]
        return [process.trace() for process in processes]


@contextlib.contextmanager
def running(cfg: Config, steps: int, virtual_workers: int, timeout_s: float | None = None) -> Iterator[Trials]:
    """Trials of a config; none of their processes and files is left when the block ends, however it does."""
    kept = signal.signal(signal.SIGTERM, interrupt)
    scratch = ScratchFolder()
    trials = Trials(cfg, steps, virtual_workers, scratch.path, timeout_s)
    try:
        yield trials
    finally:
        trials.end()
        scratch.remove()
        remove_abandoned()  # of those that were killed
        signal.signal(signal.SIGTERM, kept)


def interrupt(number: int, frame: Any) -> None:
    """A SIGTERM is as good as Ctrl-C."""
    raise KeyboardInterrupt
