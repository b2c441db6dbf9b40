"""Trials that share a cluster, and have fewer and more workers as others begin and end, come to what fixed ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Launched, wait_for
from ray_nodes import ray_nodes
from runs import Run
from sweeps import LR, SPACE, assert_whole, ledger, started, sweep, swept, told, under

from raytrain.journal.records import read_journal
from raytrain.storage.storage import open_storage
from raytrain.storage.store import newest_verified
from raytrain.sweep.ledger import trial_folder
from raytrain.sweep.view import view_of

pytestmark = pytest.mark.ray

VIRTUAL, EPOCHS = 4, 2
ONE_PROCESS = {"SCALE.NUM_WORKERS": 1, "SCALE.VIRTUAL_WORKERS": VIRTUAL, "OPTIMIZATION.NUM_EPOCHS": EPOCHS}
ELASTIC = {**ONE_PROCESS, "SCALE.NUM_WORKERS": VIRTUAL, "SCALE.MIN_WORKERS": 1, "SCALE.GROW_EVERY": 1}
LONG = {"DATA_CONFIG.NUM_SAMPLES": 800, "CHECKPOINT.EVERY_STEPS": None, "CHECKPOINT.SNAPSHOT_EVERY": 1}


def test_trials_shrink_and_grow_as_others_begin_and_end_and_come_to_what_fixed_ones_do(
    tmp_path: Path, ray_address: str
) -> None:
    gates = [tmp_path / f"gate_{number}" for number in range(3)]
    for gate in gates:
        gate.mkdir()
        (gate / "slow").write_text("0.3")
    options = {"SPACE": {"DATA_CONFIG.GATE": {"grid": list(map(str, gates))}, LR: SPACE[LR]}, "NUM_SAMPLES": 1}
    run = sweep(tmp_path / "elastic", options, **ELASTIC, **LONG)
    with ray_nodes() as nodes:
        first = nodes.add()
        nodes.add()
        launched = started(run, "--address", nodes.address)
        wait_for_sizes(run, {0: [2], 1: [2]}, launched)
        nodes.drain(first)
        wait_for_sizes(run, {0: [2, 1], 1: [2, 1]}, launched)
        nodes.add()
        wait_for_sizes(run, {0: [2, 1, 2], 1: [2, 1, 2]}, launched)
        (gates[0] / "slow").unlink()
        wait_for_sizes(run, {1: [2, 1, 2], 2: [2]}, launched)
        (gates[2] / "slow").unlink()
        wait_for_sizes(run, {1: [2, 1, 2, 4]}, launched)
        (gates[1] / "slow").unlink()
        launched.ended(0)
    resizes = [each for number in range(3) for each in events(run, number, "resize")]
    print("seconds of each change:", [round(each["seconds"], 1) for each in resizes])
    assert len(resizes) == 5 and all(each["planned"] for each in resizes)
    assert not any(events(run, number, "restart") for number in range(3))
    fixed = sweep(tmp_path / "fixed", options, **ONE_PROCESS, **LONG)
    swept(fixed)
    assert_same(run, fixed)


def test_a_population_of_elastic_trials_clones_as_one_of_fixed_ones(tmp_path: Path, ray_address: str) -> None:
    options = {**under("pbt"), "CONCURRENT": None, "NUM_SAMPLES": 2}
    elastic = sweep(tmp_path / "elastic", options, **ELASTIC, **{"SCALE.CPUS_PER_WORKER": 2})
    fixed = sweep(tmp_path / "fixed", options, **ONE_PROCESS)
    swept(elastic)
    swept(fixed)
    assert any(trial.clones for trial in view_of(ledger(elastic)).trials.values())
    assert {size for number in range(2) for size in sizes(elastic, number)} <= {2, 4}
    assert_same(elastic, fixed)


def assert_same(elastic: Run, fixed: Run) -> None:
    """The ledgers tell the same of each trial; weights have the same bits, and the same one is the best."""
    view = view_of(ledger(elastic))
    assert_whole(elastic, view)
    assert told(elastic) == told(fixed)
    assert {number: weights(elastic, number) for number in view.trials} == {
        number: weights(fixed, number) for number in view.trials
    }
    best = [yaml.safe_load((run.run_dir / "best.yaml").read_text()) for run in (elastic, fixed)]
    for of_run in best:
        for key in ("NUM_WORKERS", "MIN_WORKERS", "GROW_EVERY", "CPUS_PER_WORKER"):
            of_run["SCALE"].pop(key)
        of_run.pop("OUTPUT"), of_run.pop("CFG_FILE"), of_run["DATA_CONFIG"].pop("GATE")
    assert best[0] == best[1]


def weights(run: Run, number: int) -> str:
    """The fingerprint of a trial's newest checkpoint."""
    newest, _ = newest_verified(open_storage(str(run.run_dir / trial_folder(number))))
    assert newest is not None
    return newest.manifest.weights


def records(run: Run, number: int, kind: str) -> list[dict[str, Any]]:
    journal = run.run_dir / trial_folder(number) / "journal.jsonl"
    return [r for r in read_journal(journal) if r["kind"] == kind] if journal.exists() else []


def events(run: Run, number: int, name: str) -> list[dict[str, Any]]:
    return [record for record in records(run, number, "event") if record["event"] == name]


def sizes(run: Run, number: int) -> list[int]:
    """How many workers a trial began with, and then had."""
    return [record["num_workers"] for record in records(run, number, "run")]


def wait_for_sizes(run: Run, expected: dict[int, list[int]], launched: Launched) -> None:
    """Returns once these trials have had so many workers, and have taken a step with them."""

    def reached() -> bool:
        assert launched.process.poll() is None, launched.output()
        had = {number: sizes(run, number) for number in expected}
        begun = (events(run, number, "resize") or records(run, number, "step") for number in expected)
        return had == expected and all(begun)

    wait_for(reached, f"{expected}; {launched.output()}")
