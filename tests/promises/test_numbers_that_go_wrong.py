"""A loss or gradient that is not finite costs its step and nothing else; whoever looks is told where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import EPOCHS, LEDGER, SAMPLES, Run, assert_same_bits

from raytrain.cli import main
from raytrain.journal.records import read_journal

pytestmark = pytest.mark.ray

POISONED = {"TASK": "tasks_for_tests:Poisoned"}
HERE = ("--num_workers", "0")


def poisoned(folder: Path, poison: str, optimization: dict[str, Any] | None = None, **changes: Any) -> Run:
    """A run whose loss is NaN on those samples in that epoch: "EPOCH ID ID ..."."""
    asked = {f"OPTIMIZATION.{key}": value for key, value in (optimization or {}).items()}
    run = Run(folder, {**POISONED, **asked, **changes})
    (run.gate / "poison").write_text(poison)
    return run


def events(run: Run) -> list[dict[str, Any]]:
    return [record for record in run.records("event") if record["event"] == "nonfinite"]


def unused(run: Run, virtual_workers: int = 1) -> list[int]:
    """The samples that epoch 1 has not trained on, by the ledger; all others, and all of other epochs, it has once."""
    uses = run.payload()["model_state"]["ledger"] / (-LEDGER["OPTIMIZATION.LR"] / 8 / virtual_workers)
    assert uses.shape == (EPOCHS, SAMPLES) and set(uses.flatten().tolist()) == {0.0, 1.0}
    assert (uses.sum(1) == torch.tensor([SAMPLES, uses[1].sum(), SAMPLES])).all()
    return (uses[1] == 0).nonzero().flatten().tolist()


def test_a_batch_without_a_finite_loss_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = poisoned(tmp_path, "1 7", **LEDGER)
    assert main(run.words(*HERE)) == 0
    [event] = events(run)
    assert (event["action"], event["ranks"], event["in_a_row"], event["loss"]) == ("skip", [0], 1, None)
    assert 11 < event["step"] <= 22 and event["parameters"][:2] == ["ledger", "body.0.weight"]
    assert 7 in event["samples"] and len(event["samples"]) == 4
    assert unused(run) == sorted(event["samples"])
    assert f"nonfinite: step {event['step']}: the loss is nan (rank 0;" in capsys.readouterr().out
    assert [r["loss"] is None for r in run.records("step")] == [r["step"] == event["step"] for r in run.records("step")]
    assert all(value.isfinite().all() for value in run.payload()["model_state"].values())


def test_workers_agree_and_the_one_with_the_bad_sample_is_named(tmp_path: Path, ray_address: str) -> None:
    run = poisoned(tmp_path, "1 7", **LEDGER)
    run.run("--num_workers", "2", "--address", ray_address)
    [event] = events(run)
    [rank] = event["ranks"]
    step = [line.split() for line in (run.gate / "uses.txt").read_text().splitlines() if line.split()[1] == "1"]
    [of_rank] = [ids for _, _, ids in step if "7" in ids.split(",")]
    assert rank in (0, 1) and sorted(event["samples"]) == sorted(map(int, of_rank.split(",")))
    assert len(unused(run, 2)) == 8 and set(event["samples"]) < set(unused(run, 2))


def test_a_run_that_is_killed_between_a_bad_step_and_the_state_it_goes_back_to_ends_with_the_same_bits(
    tmp_path: Path,
) -> None:
    """Steps 17 and 20 are bad; the state to go back to is that of step 15, checkpoints come every 4 steps."""
    asked = {"NONFINITE": "rollback", "ROLLBACK_EVERY": 5, "SPIKE": {"FACTOR": 50.0, "WINDOW": 3}}
    ids = order_of(tmp_path / "order")
    poison = f"1 {ids[16][0]} {ids[19][0]}"
    whole, killed = (poisoned(tmp_path / name, poison, asked) for name in ("whole", "killed"))
    assert main(whole.words(*HERE)) == 0
    assert [(event["step"], event["action"]) for event in events(whole)] == [(17, "rollback"), (20, "rollback")]
    assert all("went back to the weights of step 15" in event["message"] for event in events(whole))
    killed.killed_at(16, *HERE)
    assert killed.names()[-1] == "checkpoint_step_16"
    (killed.gate / "SIGTERM").write_text("17")  # of its counter of passes, which goes back too: in step 19
    assert main(killed.words(*HERE)) == 75
    (killed.gate / "SIGTERM").unlink()
    assert main(killed.words(*HERE)) == 0
    assert_same_bits(killed.payload(), whole.payload())
    assert [event["step"] for event in events(killed)] == [17, 20]


def order_of(folder: Path) -> list[list[int]]:
    """The samples of each step of these runs."""
    run = Run(folder)
    assert main(run.words(*HERE)) == 0
    lines = [line.split() for line in (run.gate / "uses.txt").read_text().splitlines()]
    return [[int(i) for i in ids.split(",")] for _, _, ids in lines]


def test_a_run_that_stops_at_a_bad_step_takes_it_again_once_the_data_is_mended(
    tmp_path: Path, undisturbed_here: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = poisoned(tmp_path, "1 7", {"NONFINITE": "stop"})
    assert main(run.words(*HERE)) == 1
    told = capsys.readouterr().err
    step = events(run)[0]["step"]
    assert f"step {step}: the loss is nan (rank 0; first in the gradient of ledger, body.0.weight" in told
    assert f"OPTIMIZATION.NONFINITE is stop, so the run ends here; {run.names()[-1]} holds the state" in told
    assert run.payload(run.names()[-1])["it"] == step - 1
    assert main(run.words(*HERE)) == 1  # and as long as it is not
    (run.gate / "poison").unlink()
    assert main(run.words(*HERE)) == 0
    assert_same_bits(run.payload(), undisturbed_here.payload())


def test_too_many_bad_steps_in_a_row_end_the_run_with_the_last_good_state_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = poisoned(tmp_path, f"1 {' '.join(map(str, range(SAMPLES)))}", {"NONFINITE_LIMIT": 6})
    assert main(run.words(*HERE)) == 1
    assert "6 such steps in a row are too many (OPTIMIZATION.NONFINITE_LIMIT)" in capsys.readouterr().err
    good, last = run.payload("checkpoint_epoch_1"), run.payload(run.names()[-1])
    assert (good["it"], last["it"]) == (11, 17)
    assert_same_bits(last["model_state"], good["model_state"])
    assert_same_bits(last["optimizer_state"]["state"], good["optimizer_state"]["state"])
    events = [r["event"] for r in read_journal(run.run_dir / "journal.jsonl") if r["kind"] == "event"]
    assert events == ["nonfinite"] * 6 + ["failure"]


def test_a_run_that_never_had_a_good_step_saves_nothing_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = poisoned(tmp_path, f"0 {' '.join(map(str, range(SAMPLES)))}", {"NONFINITE_LIMIT": 6})
    assert main(run.words(*HERE)) == 1
    assert "not one step was good, so nothing is lost" in capsys.readouterr().err
    assert "checkpoint_step_6" not in run.names()
