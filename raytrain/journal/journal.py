"""Measurements of one run on their way to the sinks, without making training wait.

A step record keeps its numbers on the device. Batches of records are copied to the host at
once and written by a thread; what fails there is raised at the next call in front.
"""

from __future__ import annotations

import contextlib
import os
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from raytrain.errors import StorageError, masked
from raytrain.journal.records import Record, TrainLines, banner, eval_lines, log_line, strict

if TYPE_CHECKING:
    import torch
    from tensorboardX.event_file_writer import EventsWriter

HAND_OVER_S = 0.05
FLUSH_S = 1.0  # the live line and a `tail -f` look alive; one copy a second is not measurable
MAX_PENDING = 1000


class LogConfig(Protocol):
    """The LOG section of a config."""

    @property
    def EVERY(self) -> int: ...  # noqa: N802

    @property
    def LINE_EVERY(self) -> int: ...  # noqa: N802


class Sink(Protocol):
    """Where records go; they arrive in order, as strict JSON values, from the journal's thread."""

    def write(self, record: Record) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


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


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: the log cannot be written: {error.strerror or error}. "
            "Free space or mend the rights there, then run the same command again: it resumes."
        ) from error


def _opened(path: Path) -> IO[bytes]:
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "ab")


class JsonlSink:
    """journal.jsonl: one JSON object a line, appended."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._lines: list[str] = []
        self._file = _opened(self._path)
        with _writing(self._path):
            if _is_torn(self._path):
                self._file.write(b"\n")  # else the first line of this launch would continue the torn one
                self._file.flush()

    def write(self, record: Record) -> None:
        import json

        self._lines.append(json.dumps(record, allow_nan=False) + "\n")

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        with _writing(self._path):
            self._file.write("".join(lines).encode())
            self._file.flush()

    def close(self) -> None:
        with _writing(self._path):
            self._file.close()


def _is_torn(path: Path) -> bool:
    """Whether the file ends within a line."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


class TensorBoardSink:
    """tensorboard/: step curves in the folder, evaluation curves and pictures (x = finished epochs) in its `eval`.

    Two folders because a resume hides the overwritten points by their x, and the two count
    differently. A `run` record hides the steps and epochs after the ones it resumes from; the
    first evaluation hides itself if it had been done before.
    A pictures record names files below the run folder, which is the parent of `folder`.
    Events are written here and now: tensorboardX's own queue starts a thread and blocks for ever
    when the disk is full.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._steps: EventsWriter | None = None
        self._evals: EventsWriter | None = None
        self._eval_seen = False

    def write(self, record: Record) -> None:
        if record["kind"] == "run":
            self._hide_overwritten(record)
        elif record["kind"] == "step":
            self._steps = self._steps or self._writer(self._folder)
            self._add(self._steps, record, record["step"], _step_scalars(record))
        elif record["kind"] == "eval":
            self._evals = self._evals or self._writer(self._folder / "eval")
            if not self._eval_seen:
                self._hide_from(self._evals, record, record["epoch"])
                self._eval_seen = True
            scalars = {f"eval/{name}": value for name, value in record["metrics"].items()}
            self._add(self._evals, record, record["epoch"], scalars)
        elif record["kind"] == "pictures":
            self._evals = self._evals or self._writer(self._folder / "eval")
            self._add_pictures(self._evals, record)

    def flush(self) -> None:
        with _writing(self._folder):
            for writer in filter(None, (self._steps, self._evals)):
                writer.flush()

    def close(self) -> None:
        with _writing(self._folder):
            for writer in filter(None, (self._steps, self._evals)):
                writer.close()

    def _hide_overwritten(self, run: Record) -> None:
        self._steps = self._steps or self._writer(self._folder)
        self._hide_from(self._steps, run, run["step"] + 1)
        if (self._folder / "eval").exists():
            self._evals = self._evals or self._writer(self._folder / "eval")
            self._hide_from(self._evals, run, run["epoch"] + 1)

    def _writer(self, folder: Path) -> EventsWriter:
        from tensorboardX.event_file_writer import EventsWriter

        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Two launches of one second would else write to one file name, and the second empty it.
            suffix = f".{time.time_ns() % 10**9:09d}.{os.getpid()}"
            return EventsWriter(str(folder / "events"), suffix)

    def _hide_from(self, writer: EventsWriter, record: Record, x: int) -> None:
        """Tensorboard drops all earlier points of this folder at `x` and after."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        with _writing(self._folder):
            writer.write_event(Event(wall_time=record["time"], step=x, session_log=start))

    def _add(self, writer: EventsWriter, record: Record, x: int, scalars: Mapping[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in scalars.items()
            if isinstance(value, (int, float))  # null was not finite; text has no curve
        ]
        with _writing(self._folder):
            writer.write_event(Event(wall_time=record["time"], step=x, summary=Summary(value=values)))

    def _add_pictures(self, writer: EventsWriter, record: Record) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        for name in record["names"]:
            path = self._folder.parent / record["folder"] / f"{name}.png"
            with _writing(path):
                png = path.read_bytes()
            width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk, which comes first
            image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
            values = [Summary.Value(tag=f"pictures/{name}", image=image)]
            with _writing(self._folder):
                writer.write_event(Event(wall_time=record["time"], step=record["epoch"], summary=Summary(value=values)))


def _step_scalars(record: Record) -> dict[str, Any]:
    return {
        "meta_data/learning_rate": record["lr"],
        **{f"train/{name}": value for name, value in record["terms"].items()},
        "train/loss": record["loss"],  # after the terms: one of them may be called loss too
        "train/grad_norm": record["grad_norm"],
        "train/momentum": record["momentum"],
        "perf/samples_per_s": record["samples_per_s"],
        "perf/data_s": record["data_s"],
        "perf/step_s": record["step_s"],
    }


class LogSink:
    """train_<time>.log: the heritage's lines, on the console too where asked."""

    def __init__(
        self, path: str | os.PathLike[str], console: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self._path = Path(path)
        self._console = console
        self._clock = clock
        self._file = _opened(self._path)
        self._run: Record = {}
        self._train_lines: TrainLines | None = None

    def text(self, message: str) -> None:
        """Logs a message of your own: the header, the printed model."""
        self._say(masked(message), self._clock())

    def write(self, record: Record) -> None:
        if record["kind"] == "run":
            self._run, self._train_lines = record, TrainLines(record)
        if record["kind"] == "step":
            line = self._train_lines.line(record) if self._train_lines else None
            if line:
                self._say(line, record["time"])
            return
        level = "WARNING" if record["kind"] == "event" else "INFO"
        for line in self._lines(record):
            self._say(line, record["time"], level)

    def flush(self) -> None:
        """Nothing is held back: each line is written when it is said."""

    def close(self) -> None:
        with _writing(self._path):
            self._file.close()

    def _lines(self, record: Record) -> list[str]:
        tag = str(self._run.get("tag", ""))
        if record["kind"] == "run":
            resumed = [f"==> Resumed from {record['resumed_from']}"] if record.get("resumed_from") else []
            return [*resumed, banner(f"Start training {tag}")]
        if record["kind"] == "eval":
            return eval_lines(record, tag)
        if record["kind"] == "pictures":
            return [f"Drew {record['folder']}: {', '.join(record['names'])}"]
        if record["kind"] == "checkpoint":
            return [f"Saved {record['name']} (epoch {record['epoch']}, step {record['step']})"]
        if record["kind"] == "event":
            return [f"{record['event']}: {record['message']}"]
        if record["kind"] == "end" and record["status"] == "finished":
            return [banner(f"End training {tag}")]
        if record["kind"] == "end":
            reason = f": {record['message']}" if record.get("message") else ""
            return [f"Training {record['status']} at step {record['step']}{reason}"]
        return []

    def _say(self, message: str, time_s: float, level: str = "INFO") -> None:
        line = log_line(message, time_s, level)
        with _writing(self._path):
            self._file.write(f"{line}\n".encode())
            self._file.flush()
        if self._console:
            print(line, flush=True)
