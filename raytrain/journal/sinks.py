"""Where records go: journal.jsonl, TensorBoard, and the log of the heritage."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from raytrain.errors import StorageError, masked
from raytrain.journal.heritage_log import TrainLines, banner, eval_lines, log_line
from raytrain.journal.records import Record

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter


class Sink(Protocol):
    """Where records go; they arrive in order, as strict JSON values, from the journal's thread."""

    def write(self, record: Record) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


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
