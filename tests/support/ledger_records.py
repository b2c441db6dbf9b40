"""Records of a sweep's ledger: its launch, its trials, what these came to."""

from __future__ import annotations

from typing import Any

SWEEP = {
    "kind": "sweep",
    "time": 100.0,
    "scheduler": "asha",
    "search": "random",
    "metric": "accuracy",
    "mode": "max",
    "num_samples": 4,
    "seed": 0,
    "num_epochs": 9,
    "space": {"OPTIMIZATION.LR": {"loguniform": [1e-4, 1e-1]}},
    "concurrent": 2,
}


def trial(number: int, lr: float = 0.01) -> dict[str, Any]:
    return {"kind": "trial", "time": 101.0, "trial": number, "params": {"OPTIMIZATION.LR": lr}}


def of(kind: str, number: int, epoch: int, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "time": 102.0 + epoch, "trial": number, "epoch": epoch, **fields}


def result(number: int, epoch: int, value: float | None, **fields: Any) -> dict[str, Any]:
    fields = {"step": 10 * epoch, "metrics": {"accuracy": value}, "seconds": 1.5 * epoch, **fields}
    return of("result", number, epoch, value=value, **fields)
