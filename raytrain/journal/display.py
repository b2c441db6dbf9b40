"""What a person sees of a run: one live line on a terminal, calm plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raytrain.journal.records import Record, eta, line_due, number, total_steps
from raytrain.storage.fingerprint import DIGITS
from raytrain.storage.paths import joined

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

REDRAW_S = 0.1
IN_A_LINE, IN_A_LIST = 4, 9  # metrics that are shown
LOCATIONS = {
    "checkpoint": "checkpoint",
    "best_checkpoint": "best one",
    "pictures": "pictures",
    "run_dir": "run folder",
}


class Display:
    """Draws the records it is fed; see journal/records.py for their fields."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self._console = console or Console()
        self._in_place = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live: Live | None = None
        self._run: Record | None = None
        self._first: Record | None = None  # step record of this launch, the ETA's other end
        self._drawn_at = 0.0
        self._is_broken = False

    def feed(self, record: Record) -> None:
        """Shows what the record says, if people are to see it.

        Training goes on where nothing can be shown any more: `raytrain train | head`, a full disk.
        """
        if self._is_broken:
            return
        try:
            self._feed(record)
        except (OSError, SystemExit):  # rich ends the process where a pipe is broken
            self._is_broken = True
            discard_output(self._console)

    def _feed(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "run":
            self._run, self._first = record, None
            self._print(run_text(record))
        elif kind == "step":
            self._feed_step(record)
        elif kind == "eval":
            self._print(eval_text(record))
        elif kind == "event":
            self._print(f"{record['event']}: {record['message']}")
        elif kind == "end":
            self.close()
            self._print(end_text(record))

    def close(self) -> None:
        """Takes the live line away and leaves the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _feed_step(self, record: Record) -> None:
        if self._run is None:
            return
        self._first = self._first or record
        left_s = self._left_s(record, self._first, self._run)
        if not self._in_place:
            if line_due(record, self._run):
                self._print(step_text(record, self._run, left_s))
        elif abs(record["time"] - self._drawn_at) >= REDRAW_S:
            self._drawn_at = record["time"]
            self._draw(step_text(record, self._run, left_s, self._console.width))

    def _left_s(self, record: Record, first: Record, run: Record) -> float:
        """Seconds to the end at this launch's pace, with evaluations and saves in it."""
        steps = record["step"] - first["step"]
        pace_s = (record["time"] - first["time"]) / steps if steps else record["step_s"]
        return float(pace_s * (total_steps(run) - record["step"]))

    def _draw(self, line: str) -> None:
        from rich.live import Live
        from rich.text import Text

        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def _print(self, text: str) -> None:
        from rich.text import Text

        self._console.print(Text(text), soft_wrap=True)


def discard_output(console: Console) -> None:
    """What is flushed at exit has a place to go, where a pipe is broken or a disk is full."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), console.file.fileno())


def run_text(run: Record) -> str:
    """What starts: where, on how much, how a step is made up."""
    tag = run.get("tag") or "training"
    workers = run.get("num_workers")
    where = "in this process" if workers == 0 else "" if workers is None else workers_text(run)
    device = f"({run['device']})" if run.get("device") else ""
    samples = _counted(run["num_samples"], "sample") if "num_samples" in run else ""
    work = f"{_counted(run['num_epochs'], 'epoch')} of {_counted(run['steps_per_epoch'], 'step')}"
    lines = [f"{tag}: " + ", ".join(filter(None, [f"{where} {device}".strip(), samples, work]))]
    if all(name in run for name in ("virtual_workers", "batch_size")):
        parts = [_counted(run["virtual_workers"], "virtual worker"), f"batch size {run['batch_size']}"]
        product = run["virtual_workers"] * run["batch_size"] * run.get("accumulate", 1)
        if run.get("accumulate", 1) > 1:
            parts.append(f"{run['accumulate']} accumulated")
        lines.append(f"  a step: {' x '.join(parts)} = {_counted(product, 'sample')}")
    if run.get("resumed_from"):
        lines.append(f"  resumed from {run['resumed_from']}: epoch {run['epoch'] + 1}, after step {run['step']}")
    return "\n".join(lines)


def workers_text(run: Record) -> str:
    """`4 workers`, or of an elastic run `3 of 2-4 workers`."""
    if "max_workers" in run:
        return f"{run['num_workers']} of {run['min_workers']}-{run['max_workers']} workers"
    return _counted(run["num_workers"], "worker")


def step_text(record: Record, run: Record, left_s: float, width: int | None = None) -> str:
    """`epoch 3/20  step 420/2800  loss 0.1234  lr 1.2e-03  grad 3.21  512 samples/s  ETA 1:23`.

    Of an elastic run also how many workers there are. A `width` that is too small costs first the task's own numbers,
    then lr and grad.
    """
    rate, absent = record["samples_per_s"], _absent(record, "grad_norm")
    own = {name: f"{name} {number(value)}" for name, value in record["disp"].items() if name not in ("loss", "lr")}
    parts = {
        "": f"epoch {record['epoch'] + 1}/{run['num_epochs']}  step {record['step']}/{total_steps(run)}",
        "loss": f"loss {number(record['loss'])}",
        "lr": f"lr {record['lr']:.1e}",
        "grad": "" if absent else f"grad {_three(record['grad_norm'])}",
        **own,
        " rate": "" if rate is None else f"{rate:.0f} samples/s" if rate >= 10 else f"{rate:.2f} samples/s",
        " workers": workers_text(run) if "max_workers" in run else "",
        " eta": f"ETA {eta(left_s)}",
    }
    for name in (*reversed(own), "lr", "grad"):
        if width is None or len(_joined(parts)) <= width:
            break
        parts[name] = ""
    return _joined(parts)


def _joined(parts: Mapping[str, str]) -> str:
    return "  ".join(filter(None, parts.values()))


def eval_text(record: Record) -> str:
    """`epoch 3  accuracy 0.9812  loss 0.07`."""
    metrics = [f"{name} {number(value)}" for name, value in record["metrics"].items()]
    if len(metrics) > IN_A_LINE:
        metrics = [*metrics[: IN_A_LINE - 1], f"and {len(metrics) - IN_A_LINE + 1} more"]
    best = ["best so far"] if record.get("best") is True else []
    return "  ".join([f"epoch {record['epoch']}", *metrics, *best])


def metric_lines(metrics: Mapping[str, Any], where: str) -> list[str]:
    """One for each of the first metrics, which are the ones a task cares for most; the rest are `where`."""
    names = list(metrics)[:IN_A_LIST]
    width = max([12, *map(len, names)])
    lines = [f"  {name:<{width}} {number(metrics[name])}" for name in names]
    if len(metrics) > len(names):
        lines.append(f"  and {len(metrics) - len(names)} more in {where}")
    return lines


def end_text(end: Record) -> str:
    """How it ended, the metrics, and where to look."""
    took = f" in {eta(end['seconds'])}" if end.get("seconds") is not None else ""
    reason = f": {end['message']}" if end.get("message") else ""
    lines = [f"{end['status']} after epoch {end['epoch']}, step {end['step']}{took}{reason}"]
    lines += metric_lines(end.get("metrics") or {}, "journal.jsonl")
    if end.get("best"):
        best = ", ".join(f"{name} {number(value)}" for name, value in end["best"].items())
        lines.append(f"  {'best':<12} {best}")
    if end.get("weights"):
        lines.append(weights_line(end["weights"]))
    for name, title in LOCATIONS.items():
        if end.get(name):
            lines.append(f"  {title:<12} {end[name]}")
    if end.get("run_dir"):
        lines.append(f"  {'curves':<12} {curves_text(joined(str(end['run_dir']), 'tensorboard'))}")
    return "\n".join(lines)


def curves_text(folder: str) -> str:
    """How to see the curves in this folder; TensorBoard reads none behind a URI without packages of its own for it."""
    return f"copy {folder} to a disk, for tensorboard" if "://" in folder else f"tensorboard --logdir {folder}"


def weights_line(weights: str) -> str:
    """As many digits of a fingerprint as people compare by eye."""
    return f"  {'weights':<12} {weights[:DIGITS]}"


def _absent(record: Record, name: str) -> bool:
    return record[name] is None and name not in record.get("nonfinite", ())


def _three(value: float | None) -> str:
    return "nan" if value is None else f"{value:.3g}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
