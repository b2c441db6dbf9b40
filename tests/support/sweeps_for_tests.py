"""A sweep's folder with plausible curves and gradient norms, written by the real ledger and the journal's sink.

As a script it writes one, and its sweep.html beside it, to look at:
python tests/support/sweeps_for_tests.py FOLDER [TRIALS]
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
from pathlib import Path
from typing import Any

import yaml

from raytrain.journal.run_folder import RunFolder
from raytrain.journal.sinks import JsonlSink
from raytrain.storage.lock import JOURNAL
from raytrain.storage.storage import open_storage
from raytrain.sweep.ledger import LEDGER, Ledger, read_ledger, trial_folder
from raytrain.sweep.view import SweepView, view_of

LR, CLIP, DROPOUT, OPTIMIZER = (
    "OPTIMIZATION.LR",
    "OPTIMIZATION.GRAD_NORM_CLIP",
    "MODEL.DROPOUT",
    "OPTIMIZATION.OPTIMIZER",
)
STEPS, EPOCHS, EPOCH_S = 23, 9, 0.4
SPACE = {
    LR: {"loguniform": [1e-4, 1.0]},
    CLIP: {"loguniform": [0.1, 100.0]},
    DROPOUT: {"uniform": [0.0, 0.6]},
    OPTIMIZER: {"choice": ["adam_onecycle", "sgd"]},
}
ERROR = "Traceback (most recent call last):\nRuntimeError: <script>document.title='broken'</script> & \"out\" of memory"

SWEEP = {"kind": "sweep", "time": 0.0, "metric": "accuracy", "mode": "max", "num_samples": 4, "num_epochs": 9}


def sweep_under_way(params: list[dict[str, Any]], curves: list[list[float | None]], **launch: Any) -> SweepView:
    """Trials with these parameters and these values after epochs 1, 2, ..., all under way."""
    facts = {"metric": "accuracy", "mode": "max", "num_epochs": 9, "num_samples": len(params), "space": {}, **launch}
    records: list[dict[str, Any]] = [{"kind": "sweep", "time": 0.0, **facts}]
    for number, (own, curve) in enumerate(zip(params, curves, strict=True)):
        records.append({"kind": "trial", "time": 1.0, "trial": number, "params": own})
        for epoch, value in enumerate(curve, 1):
            measured = {"epoch": epoch, "step": epoch, "value": value, "metrics": {}, "seconds": float(epoch)}
            records.append({"kind": "result", "time": 2.0, "trial": number, **measured})
    return view_of(records)


def write_sweep(folder: Path, num_trials: int = 24, seed: int = 0, failed: int | None = 5) -> SweepView:
    """A finished sweep under ASHA: rungs at 1, 3 and 9 epochs, a third goes on; one trial failed, one gave nan."""
    rng = random.Random(seed)
    trials = [_params(rng) for _ in range(num_trials)]
    curves = [_curve(params, rng) for params in trials]
    if num_trials > 9:
        curves[9] = [*curves[9][:1], math.nan, *curves[9][2:]]
    ends = _ends(curves)
    now = 1_700_000_000.0
    with contextlib.closing(RunFolder(str(folder), LEDGER)) as run, contextlib.closing(Ledger(run)) as ledger:
        ledger.append(_launch(num_trials, now))
        for number, params in enumerate(trials):
            of = {"trial": number}
            ledger.append({"kind": "trial", "time": now, **of, "params": params})
            ledger.append({"kind": "start", "time": now, **of, "epoch": 0})
            last = 2 if number == failed else ends[number]
            for epoch in range(1, last + 1):
                now += EPOCH_S
                value = curves[number][epoch - 1]
                ledger.append(
                    {"kind": "result", "time": now, **of, "epoch": epoch, "step": epoch * STEPS, "value": value}
                    | {"metrics": {"accuracy": value}, "seconds": epoch * EPOCH_S}
                )
            ledger.append({"time": now, **of, "epoch": last, **_end(number == failed, last)})
            write_journal(folder / trial_folder(number), params, last, rng)
        ledger.append({"kind": "end", "time": now, "status": "finished", "best": 7, "value": 0.99, "seconds": 60.0})
    return view_of(read_ledger(open_storage(str(folder))))


def write_journal(folder: Path, params: dict[str, Any], epochs: int, rng: random.Random, scale: float = 1.0) -> None:
    """The trial's config.yaml, and its journal with norms around `scale`, larger in the first steps."""
    folder.mkdir(parents=True, exist_ok=True)
    optimization = {key.rpartition(".")[2]: value for key, value in params.items() if key.startswith("OPTIM")}
    (folder / "config.yaml").write_text(yaml.safe_dump({"OPTIMIZATION": optimization}))
    sink = JsonlSink(folder / JOURNAL)
    sink.write({"kind": "run", "time": 0.0, "step": 0, "epoch": 0, "steps_per_epoch": STEPS, "num_epochs": EPOCHS})
    for step in range(1, epochs * STEPS + 1):
        norm = scale * math.exp(rng.gauss(0, 0.6)) * (1 + 4 * math.exp(-step / 8))
        place = {"step": step, "epoch": (step - 1) // STEPS, "iteration": (step - 1) % STEPS}
        sink.write({"kind": "step", "time": float(step), **place, "loss": 1.0, "grad_norm": norm, "lr": 0.1})
    sink.flush()
    sink.close()


def _launch(num_trials: int, now: float) -> dict[str, Any]:
    facts = {"scheduler": "asha", "search": "random", "metric": "accuracy", "mode": "max", "num_samples": num_trials}
    return {"kind": "sweep", "time": now, **facts, "seed": 0, "num_epochs": EPOCHS, "space": SPACE, "concurrent": 2}


def _params(rng: random.Random) -> dict[str, Any]:
    return {
        LR: 10 ** rng.uniform(-4, 0),
        CLIP: 10 ** rng.uniform(-1, 2),
        DROPOUT: rng.uniform(0, 0.6),
        OPTIMIZER: rng.choice(["adam_onecycle", "sgd"]),
    }


def _curve(params: dict[str, Any], rng: random.Random) -> list[float]:
    """Best near LR 0.01; a small clip slows down, a large LR without one breaks."""
    off = math.log10(params[LR]) + 2
    ceiling = 0.995 - 0.10 * off**2 - 0.05 * max(0.0, off) * max(0.0, math.log10(params[CLIP]))
    ceiling -= 0.08 * max(0.0, -math.log10(params[CLIP])) + (0.02 if params[OPTIMIZER] == "sgd" else 0.0)
    pace = 0.55 + 0.25 * min(0.0, off) + 0.6
    curve = [ceiling - (ceiling - 0.1) * math.exp(-max(0.15, pace) * epoch) for epoch in range(1, EPOCHS + 1)]
    return [min(1.0, max(0.05, value + rng.gauss(0, 0.006))) for value in curve]


def _ends(curves: list[list[float]]) -> list[int]:
    """The epoch at which each is stopped: a third goes on at each rung."""
    ends, going = [1] * len(curves), list(range(len(curves)))
    for rung in (1, 3, EPOCHS):
        for number in going:
            ends[number] = rung
        going.sort(key=lambda number: -curves[number][rung - 1])
        going = going[: max(1, math.ceil(len(going) / 2.4))]
    return ends


def _end(failed: bool, last: int) -> dict[str, Any]:
    if failed:
        return {"kind": "failed", "error": ERROR, "logs": "trial_0005/logs"}
    return {"kind": "done"} if last == EPOCHS else {"kind": "stopped", "why": "asha"}


if __name__ == "__main__":
    from raytrain.sweep.report import write_report

    where = Path(sys.argv[1])
    write_report(open_storage(str(where)), write_sweep(where, int(sys.argv[2]) if len(sys.argv) > 2 else 24))
    print(where / "sweep.html")


def trial(number: int, lr: float = 0.00421) -> dict[str, Any]:
    return {"kind": "trial", "time": 0.0, "trial": number, "params": {LR: lr, CLIP: 3.1}}


def of(kind: str, number: int, epoch: int, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "time": 2.0, "trial": number, "epoch": epoch, **fields}
