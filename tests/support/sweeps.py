"""Small sweeps for the tests: of four trials, by real Ray Tune, and what they leave."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commands import Launched, alive, commanded, family, wait_for
from runs import Run

import raytrain
from raytrain.journal.records import Record, read_journal
from raytrain.storage.storage import open_storage
from raytrain.storage.store import newest_verified
from raytrain.sweep.ledger import read_ledger, trial_folder
from raytrain.sweep.tune import SweepOptions, SweepResult, tune
from raytrain.sweep.view import SweepView

EPOCHS = 4
LR, CLIP = "OPTIMIZATION.LR", "OPTIMIZATION.GRAD_NORM_CLIP"
SPACE = {LR: {"loguniform": [1e-4, 1.0]}, CLIP: {"loguniform": [0.1, 10.0]}}
SCHEDULERS = ("none", "asha", "hyperband", "median", "pbt", "pb2")
PBT = {"SCHEDULER": "pbt", "PERTURB_EVERY": 1, "QUANTILE": 0.5}

Undisturbed = Callable[[str], Run]


def sweep(folder: Path, tune_cfg: dict[str, Any] | None = None, **changes: Any) -> Run:
    """Four trials, of one worker unless `changes` say otherwise."""
    own = {"SPACE": copy.deepcopy(SPACE), "METRIC": "accuracy", "NUM_SAMPLES": 4, "CONCURRENT": 2, "REDUCTION": 2}
    told = {"TUNE": {**own, **(tune_cfg or {})}, "OPTIMIZATION.NUM_EPOCHS": EPOCHS, "SCALE.NUM_WORKERS": 1}
    return Run(folder, {**told, **changes})


def under(scheduler: str) -> dict[str, Any]:
    return PBT if scheduler == "pbt" else {"SCHEDULER": scheduler, "PERTURB_EVERY": 1}


def swept(run: Run, *words: str, extend: int = 0) -> SweepResult:
    """The sweep, begun or gone on with in this process, on the cluster that it is connected to."""
    cfg = raytrain.load_config(run.config_file, ["OUTPUT", str(run.folder / "output"), *words])
    return tune(cfg, SweepOptions(extend=extend))


def flags(run: Run, *more: str) -> list[str]:
    return ["tune", *run.words(*more)[1:]]


def started(run: Run, *more: str) -> Launched:
    """The command, in a process group and on a cluster of its own."""
    return commanded(flags(run, *more), run.folder)


def ledger(run: Run) -> list[Record]:
    return read_ledger(open_storage(str(run.run_dir)))


def told(run: Run, *kinds: str) -> dict[int, list[Record]]:
    """By trial its records of these kinds, without what time decides."""
    found: dict[int, list[Record]] = {}
    for record in ledger(run):
        if record["kind"] in (kinds or ("trial", "result", "clone", "stopped", "done")):
            own = {key: value for key, value in record.items() if key not in ("time", "seconds")}
            found.setdefault(record["trial"], []).append(own)
    return found


def count(run: Run, kind: str) -> int:
    return sum(record["kind"] == kind for record in ledger(run))


def journals(run: Run, view: SweepView, state: str = "done") -> dict[int, bytes]:
    """Of the trials in that state."""
    ended = [number for number, trial in view.trials.items() if trial.state == state]
    return {number: (run.run_dir / trial_folder(number) / "journal.jsonl").read_bytes() for number in ended}


def assert_whole(run: Run, view: SweepView) -> None:
    """All that a sweep leaves is there and nothing else; each trial is a run folder that ends where the trial does."""
    names = {path.name for path in run.run_dir.iterdir()}
    assert {"sweep.yaml", "sweep.jsonl", "sweep.csv", "best.yaml", "sweep.html"} <= names
    assert "tune" not in names
    for number, trial in view.trials.items():
        folder = run.run_dir / trial_folder(number)
        newest, passed_over = newest_verified(open_storage(str(folder)))
        assert newest is not None and not passed_over
        progress = newest.manifest.progress
        assert (progress.epoch, progress.cursor) == (trial.epoch, 0), f"trial {number} {trial.state} at {trial.epoch}"
        evals = [record for record in read_journal(folder / "journal.jsonl") if record["kind"] == "eval"]
        assert [record["epoch"] for record in evals][-1] == trial.epoch
        assert list((folder / "tensorboard").rglob("events.*"))
    wait_for(lambda: not actors(), "the end of all trials' processes")


def actors(*names: str) -> list[int]:
    """Processes of trials below this one: of these names, or that have work or none."""
    wanted = tuple(name.encode() for name in names or ("ray::TrialActor", "ray::ResourceTrainable."))

    def trains(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(wanted)
        except OSError:
            return False

    return [pid for pid in family(os.getpid()) if trains(pid) and alive(pid)]
