"""Measurements of one run on their way to the sinks, without making training wait.

A step record keeps its numbers on the device. Batches of records are copied to the host at
once and written by a thread; what fails there is raised at the next call in front.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from raytrain.errors import masked
from raytrain.journal.records import Record, strict
from raytrain.journal.sinks import Sink

if TYPE_CHECKING:
    import torch

HAND_OVER_S = 0.05
FLUSH_S = 1.0  # the live line and a `tail -f` look alive; one copy a second is not measurable
MAX_PENDING = 1000


class LogConfig(Protocol):
    """The LOG section of a config."""

    @property
    def EVERY(self) -> int: ...  # noqa: N802

    @property
    def LINE_EVERY(self) -> int: ...  # noqa: N802


class Journal:
    """Takes the measurements of a run and hands them to its sinks. Without sinks it drops them."""

    def __init__(self, sinks: Sequence[Sink], log_cfg: LogConfig, clock: Callable[[], float] = time.time) -> None:
        self._sinks = list(sinks)
        self._log_cfg = log_cfg
        self._clock = clock
        self._handed_over_at = clock()
        self._batch = _Batch()
        self._queue: queue.Queue[_Batch | None] = queue.Queue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._write_batches, name="raytrain-journal", daemon=True)
        if self._sinks:
            self._thread.start()

    def wants(self, step: int, iteration: int, steps_per_epoch: int) -> bool:
        """Whether step number `step` (from 1), iteration `iteration` (from 0) of its epoch, is to be recorded."""
        return (
            step % self._log_cfg.EVERY == 0
            or step % self._log_cfg.LINE_EVERY == 0
            or iteration in (0, steps_per_epoch - 1)
        )

    def run(self, **fields: Any) -> None:
        """Records that a launch starts or resumes; the fields are in journal/records.py."""
        self.write("run", line_every=self._log_cfg.LINE_EVERY, **fields)

    def step(
        self,
        *,
        step: int,
        epoch: int,
        iteration: int,
        loss: torch.Tensor | float,
        grad_norm: torch.Tensor | float | None,
        lr: float,
        momentum: float | None,
        terms: Mapping[str, Any],
        disp: Mapping[str, Any],
        samples: int,
        data_s: float,
        step_s: float,
    ) -> None:
        """Takes one step's record; nothing is read from the device and no file is written here.

        Tensors may be reused by the next step. samples: of this step, over all workers.
        data_s, step_s: seconds waited for data, and for the whole step, data included.
        """
        self._raise_failure()
        if not self._sinks:
            return
        now = self._clock()
        self._batch.add(
            {
                "kind": "step",
                "time": now,
                "step": step,
                "epoch": epoch,
                "iteration": iteration,
                "loss": loss,
                "grad_norm": grad_norm,
                "lr": lr,
                "momentum": momentum,
                "samples": samples,
                "data_s": data_s,
                "step_s": step_s,
                "samples_per_s": samples / step_s if step_s else None,
                "terms": dict(terms),
                "disp": dict(disp),
            }
        )
        if now - self._handed_over_at >= FLUSH_S or len(self._batch.records) >= MAX_PENDING:
            self._hand_over(now)

    def hand_over(self) -> None:
        """The steps so far are about to be written; asked very often, it waits a little."""
        now = self._clock()
        if now - self._handed_over_at >= HAND_OVER_S:
            self._hand_over(now)

    def write(self, kind: str, /, **fields: Any) -> None:
        """Records an eval, checkpoint, event or end; it and all before it are written on return."""
        shown = {name: masked(value) if isinstance(value, str) else value for name, value in fields.items()}
        self._batch.add({"kind": kind, "time": self._clock(), **shown})
        self.flush()

    def flush(self) -> None:
        """Returns when every record taken so far is written; raises what went wrong with one."""
        self._hand_over(self._clock())
        self._queue.join()
        self._raise_failure()

    def close(self) -> None:
        """Writes what is left and closes the sinks."""
        try:
            self.flush()
        finally:
            if self._thread.is_alive():
                self._queue.put(None)
                self._thread.join()
            with contextlib.ExitStack() as stack:
                for sink in self._sinks:
                    stack.callback(sink.close)
            self._sinks = []

    def _hand_over(self, now: float) -> None:
        self._handed_over_at = now
        batch, self._batch = self._batch, _Batch()
        if batch.records and self._sinks:
            batch.start_copy()
            self._queue.put(batch)

    def _write_batches(self) -> None:
        while True:
            batch = self._queue.get()
            try:
                if batch is None:
                    return
                if self._failure is None:
                    self._write_batch(batch)
            except BaseException as failure:  # raised at the next call in front
                self._failure = failure
            finally:
                self._queue.task_done()

    def _write_batch(self, batch: _Batch) -> None:
        batch.finish_copy()
        for record in map(strict, batch.records):
            for sink in self._sinks:
                sink.write(record)
        for sink in self._sinks:
            sink.flush()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


class _Batch:
    """Records whose tensors come to the host together, in one copy for each device."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._stacks: dict[torch.device, list[torch.Tensor]] = {}
        self._places: dict[torch.device, list[tuple[Record, str]]] = {}
        self._copies: list[tuple[torch.Tensor, torch.cuda.Event | None, list[tuple[Record, str]]]] = []

    def add(self, record: Record) -> None:
        self.records.append(record)
        if record["kind"] != "step":
            return
        import torch

        here: dict[torch.device, list[torch.Tensor]] = {}
        for values in (record, record["terms"], record["disp"]):
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    here.setdefault(value.device, []).append(_scalar(value))
                    self._places.setdefault(value.device, []).append((values, name))
                    values[name] = None  # a loss that is kept would keep its whole graph
        for device, scalars in here.items():
            # A copy on the device: the next step may overwrite these tensors in place.
            self._stacks.setdefault(device, []).append(torch.stack(scalars))

    def start_copy(self) -> None:
        import torch

        for device, stacks in self._stacks.items():
            asynchronous = device.type == "cuda"  # elsewhere a copy that is not waited for may be read too soon
            host, copied = torch.cat(stacks).to("cpu", non_blocking=asynchronous), None
            if asynchronous:
                copied = torch.cuda.Event()
                copied.record(torch.cuda.current_stream(device))
            self._copies.append((host, copied, self._places[device]))

    def finish_copy(self) -> None:
        for host, copied, places in self._copies:
            if copied is not None:
                copied.synchronize()
            for (values, name), value in zip(places, host.tolist(), strict=True):
                values[name] = value


def _scalar(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    return value.reshape(()) if value.numel() == 1 else value.float().mean()
