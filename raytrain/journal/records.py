"""What a journal says: its records read back, and the lines that people read.

A record is a dict with `kind` and `time` (seconds since 1970) and the fields of its kind.
`epoch` of a step counts from 0 and is the epoch under way; elsewhere it counts finished epochs.

run         a launch starts or resumes after `step`: epoch, steps_per_epoch, num_epochs, line_every, tag;
            shown where given: num_samples, batch_size, accumulate, virtual_workers, num_workers, device,
            resumed_from, launch, param_count
step        step (iterations done), epoch, iteration (of the epoch, from 0), loss, grad_norm, lr, momentum,
            samples, data_s, step_s, samples_per_s, terms {}, disp {}
eval        step, epoch, metrics {}; shown where given: samples, seconds, best (true: the best so far)
pictures    step, epoch, folder (below the run folder), names (of the files NAME.png in it)
checkpoint  step, epoch, name
event       event (what happened: failure, restart, straggler, note ...), message;
            nonfinite, spike: a step without effect: step, ranks, parameters, samples (ids), action, in_a_row, loss,
            grad_norm;   hang: a worker that was killed for it: rank, step, phase, calls
end         status (finished, complete, stopped, failed), step, epoch; shown where given: metrics {},
            best {}, checkpoint, best_checkpoint, pictures, run_dir, seconds, message
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raytrain.errors import StorageError, TaskError

Record = dict[str, Any]


def read_journal(source: str | os.PathLike[str] | Iterable[str]) -> list[Record]:
    """The records that count, oldest first, of a journal file or of its lines.

    Dropped are lines that a killed writer tore, step, eval, pictures and checkpoint records, and events of bad
    steps, that a later resume overwrote, and an evaluation or pictures that were made again at the same step.
    """
    if isinstance(source, (str, os.PathLike)):
        try:
            source = Path(source).read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError as error:
            raise StorageError(f"{source}: no journal to read there ({error.strerror}); name a run folder's") from error
    effective: list[Record] = []
    for record in records_of(source):
        if record["kind"] == "run":
            effective = [r for r in effective if not _overwritten(r, record.get("step", 0))]
        if record["kind"] in ("eval", "pictures"):
            same = record["kind"], record.get("step")
            effective = [r for r in effective if (r["kind"], r.get("step")) != same]
        effective.append(record)
    return effective


def new_records(path: str | os.PathLike[str], offset: int) -> tuple[list[Record], int]:
    """Records whose lines were completed since byte `offset`, and the offset to go on from.

    A journal that does not exist yet has none. One that was replaced is read from its start.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < offset:
                offset = 0
            file.seek(offset)
            whole, newline, _ = file.read().rpartition(b"\n")
    except FileNotFoundError:
        return [], 0
    lines = whole.decode("utf-8", errors="replace").split("\n")
    return records_of(lines), offset + len(whole) + len(newline)


def records_of(lines: Iterable[str]) -> list[Record]:
    """The records in these lines; those that a killed writer tore are dropped."""
    return list(filter(None, map(_parsed, lines)))


def _parsed(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # torn: the start of an object is never an object; or not ours
        return None
    if not isinstance(record, dict) or "kind" not in record or not isinstance(record.get("step", 0), int):
        return None
    return record


def _overwritten(record: Record, resumed_step: int) -> bool:
    of_a_step = record["kind"] in ("step", "eval", "pictures", "checkpoint")
    of_a_step |= record["kind"] == "event" and record.get("event") in ("nonfinite", "spike")
    return of_a_step and record.get("step", 0) > resumed_step


def strict(record: Mapping[str, Any]) -> Record:
    """The record in plain JSON values: nan and inf become null and are named in `nonfinite`."""
    nonfinite: list[str] = []
    clean: Record = {str(name): _plain(value, str(name), nonfinite) for name, value in record.items()}
    if nonfinite:
        clean["nonfinite"] = nonfinite
    return clean


def _plain(value: Any, name: str, nonfinite: list[str]) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        nonfinite.append(name)
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}.{index}", nonfinite) for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # tensors, arrays and numpy's scalars
        return _plain(value.tolist(), name, nonfinite)
    raise TaskError(
        f"{name} is {value!r} of type {type(value).__name__}, which cannot be journalled; "
        "return numbers, scalar tensors or text"
    )


def line_due(record: Record, run: Record) -> bool:
    """Whether a step record is one that people are shown: every `line_every` steps, an epoch's first and last."""
    last = run["steps_per_epoch"] - 1
    return record["step"] % run["line_every"] == 0 or record["iteration"] in (0, last)


def total_steps(run: Record) -> int:
    return run["steps_per_epoch"] * run["num_epochs"]


def interval(seconds: float) -> str:
    """`MM:SS`, or `H:MM:SS` from an hour on."""
    minutes, left = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes:02d}:{left:02d}"


def eta(seconds: float) -> str:
    """`M:SS`, or `H:MM:SS` from an hour on."""
    return interval(seconds).removeprefix("0")


def number(value: Any) -> str:
    """A metric in four digits; text as it is; what was not finite as nan."""
    if value is None:
        return "nan"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def clean(text: str) -> str:
    """`text` without what would steer a terminal: a manifest, an error may come from elsewhere."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def log_file_name(time_s: float) -> str:
    """Name of the heritage's log file of a run that starts at `time_s`."""
    return time.strftime("train_%Y%m%d-%H%M%S.log", time.localtime(time_s))


def log_line(message: str, time_s: float, level: str = "INFO") -> str:
    """`<time>,<ms>  <level>  <message>` as in the heritage's log."""
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))
    return f"{moment},{int(time_s % 1 * 1000):03d}  {level:>5}  {message}"


def banner(text: str) -> str:
    return f"{'*' * 22}{text}{'*' * 22}"


def header_lines(arguments: Mapping[str, Any], config: Mapping[str, Any], total_batch_size: int | None) -> list[str]:
    """The start of the heritage's log: banner, environment, arguments, config.

    total_batch_size: samples of a step when several processes train, None for one.
    """
    mode = (
        "Training with a single process"
        if total_batch_size is None
        else f"Training in distributed mode : total_batch_size: {total_batch_size}"
    )
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "ALL")
    words = [f"{name:16} {value}" for name, value in arguments.items()]
    return [banner("Start logging"), f"CUDA_VISIBLE_DEVICES={devices}", mode, *words, *config_lines(config)]


def config_lines(config: Mapping[str, Any], prefix: str = "cfg") -> list[str]:
    """`cfg.A.B: value` for each leaf, a heading before each section."""
    lines = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            lines += [f"----------- {key} -----------", *config_lines(value, f"{prefix}.{key}")]
        else:
            lines.append(f"{prefix}.{key}: {value}")
    return lines


def model_lines(model: Any) -> list[str]:
    """The heritage's two messages on a torch module: its name with the parameter count, its tree."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return [f"----------- Model {type(model).__name__} created, param count: {count} -----------", str(model)]


def eval_lines(record: Record, tag: str) -> list[str]:
    """The heritage's lines on one evaluation."""
    epoch = record["epoch"]
    lines = [
        banner(f"Start evaluation {tag}"),
        f"*************** EPOCH {epoch} EVALUATION *****************",
        f"*************** Performance of EPOCH {epoch} *****************",
    ]
    if record.get("samples") and record.get("seconds") is not None:
        lines.append(f"Generate label finished(sec_per_example: {record['seconds'] / record['samples']:.4f} second).")
    for name, value in record["metrics"].items():
        lines.append(f"{name}: {value:.6f}" if isinstance(value, float) else f"{name}: {number(value)}")
    return [
        *lines,
        "****************Evaluation done.*****************",
        f"Epoch {epoch} has been evaluated",
        banner(f"End evaluation {tag}"),
    ]


class TrainLines:
    """The heritage's `Train:` lines of one launch, from its step records.

    Averages run over the records of the epoch so far: over every step where LOG.EVERY is 1.
    """

    def __init__(self, run: Record) -> None:
        self._run = run
        self._means = _Means(None)

    def line(self, record: Record) -> str | None:
        """The line of a step record, None where none is due."""
        if self._means.first is None or self._means.first["epoch"] != record["epoch"]:
            self._means = _Means(record)
        means = self._means
        means.add(record)
        if not line_due(record, self._run):
            return None
        run, epoch, iteration = self._run, record["epoch"] + 1, record["iteration"]
        loss = math.nan if record["loss"] is None else record["loss"]
        data_s, step_s = record["data_s"], record["step_s"]
        return (
            f"Train: {epoch:>4d}/{run['num_epochs']} ({100 * epoch / run['num_epochs']:>3.0f}%)"
            f" [{iteration:>4d}/{run['steps_per_epoch']} ({100 * iteration / run['steps_per_epoch']:>3.0f}%)]"
            f"  Loss: {loss:#.4g} ({means.loss:#.3g})  LR: {record['lr']:.3e}"
            f"  Time cost: {self._time_cost(record)}  Acc_iter {record['step']:<10d}"
            f"  Data time: {data_s:.2f}({means.data_s:.2f})"
            f"  Forward time: {step_s - data_s:.2f}({means.step_s - means.data_s:.2f})"
            f"  Batch time: {step_s:.2f}({means.step_s:.2f})"
        )

    def _time_cost(self, record: Record) -> str:
        """Elapsed/remaining of the epoch, then of the whole run, at this epoch's pace."""
        first = self._means.first or record
        elapsed = record["time"] - (first["time"] - first["step_s"])
        pace = elapsed / (record["iteration"] - first["iteration"] + 1)
        left = pace * (self._run["steps_per_epoch"] - 1 - record["iteration"])
        all_elapsed = record["time"] - self._run["time"]
        all_left = pace * (total_steps(self._run) - record["step"])
        return f"{interval(elapsed)}/{interval(left)} [{interval(all_elapsed)}/{interval(all_left)}]"


class _Means:
    """Averages over the step records of one epoch that starts, in this launch, with `first`."""

    def __init__(self, first: Record | None) -> None:
        self.first = first
        self._count = self._samples = 0
        self._loss = self._data_s = self._step_s = 0.0

    def add(self, record: Record) -> None:
        self._count += 1
        self._data_s += record["data_s"]
        self._step_s += record["step_s"]
        if record["loss"] is not None:  # one NaN must not hide the average of the rest
            self._samples += record["samples"]
            self._loss += record["loss"] * record["samples"]

    @property
    def loss(self) -> float:
        return self._loss / self._samples if self._samples else math.nan

    @property
    def data_s(self) -> float:
        return self._data_s / self._count

    @property
    def step_s(self) -> float:
        return self._step_s / self._count
