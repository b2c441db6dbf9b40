"""The lines that OpenPCDet's tools write to their log."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from typing import Any

from raytrain.journal.records import Record, interval, line_due, number, total_steps


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
