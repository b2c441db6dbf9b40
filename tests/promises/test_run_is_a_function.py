"""Promise 1: killing and resuming a run changes its wall clock and nothing else."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from commands import alive, gone, wait_for
from runs import EPOCHS, Run, assert_curves_are_whole, assert_same_bits, assert_uses_once, loader_workers_of

from raytrain.cli import main

pytestmark = pytest.mark.ray


def test_a_run_killed_in_mid_epoch_ends_with_the_same_bits(tmp_path: Path, undisturbed_here: Run) -> None:
    """With loader workers; without any, a folder behind s3:// in test_s3, and every phase of a run in test_faults."""
    run = Run(tmp_path, {"LOADER.WORKERS": 2})
    run.killed_at(14, "--num_workers", "0")
    assert run.payload(run.names()[-1])["raytrain"]["progress"] == {"epoch": 1, "cursor": 4, "step": 12}
    run.run("--num_workers", "0")
    assert_same_bits(run.payload(), undisturbed_here.payload())
    assert_uses_once(run, virtual_workers=1)
    assert_curves_are_whole(run, steps_per_epoch=11)


def test_a_run_on_two_workers_killed_in_mid_epoch_ends_with_the_same_bits(
    tmp_path: Path, undisturbed_on_two: Run, ray_address: str
) -> None:
    """On a cluster that was joined; test_storm has one of the run's own."""
    run = Run(tmp_path, {"LOADER.WORKERS": 2})
    flags = ["--num_workers", "2", "--address", ray_address]
    run.killed_at(9, *flags, processes=2, workers_too=False)  # Ray is to end them
    assert run.payload(run.names()[-1])["raytrain"]["progress"] == {"epoch": 1, "cursor": 16, "step": 8}
    run.run(*flags)
    assert_same_bits(run.payload(), undisturbed_on_two.payload())
    assert_uses_once(run, virtual_workers=2)
    assert_curves_are_whole(run, steps_per_epoch=6)


def test_a_run_of_which_a_worker_is_killed_goes_on_by_itself(
    tmp_path: Path, undisturbed_on_two: Run, ray_address: str
) -> None:
    """On a cluster that was joined; test_storm has one of the run's own."""
    run = Run(tmp_path, {"LOADER.WORKERS": 2})
    said = run.with_a_worker_killed_at(9, ray_address, rank=0)
    assert "restart: rank 0 died without a word in step " in said and "go on after step 8\n" in said
    assert_same_bits(run.payload(), undisturbed_on_two.payload())
    assert_uses_once(run, virtual_workers=2)
    assert_curves_are_whole(run, steps_per_epoch=6)


def test_a_run_killed_again_and_again_at_any_moment_ends_with_the_same_bits(
    tmp_path: Path, undisturbed_here: Run
) -> None:
    run = Run(tmp_path, {"CHECKPOINT.EVERY_STEPS": 1})
    (run.gate / "slow").write_text("0.02")
    for _ in range(2):
        run.hold(0)
        launched = run.start("--num_workers", "0")
        run.held(1, launched)
        run.release()
        time.sleep(random.uniform(0.0, 0.3))  # where it dies is what must not matter
        launched.kill([])
    (run.gate / "slow").unlink()
    assert main(run.words("--num_workers", "0")) == 0
    assert_same_bits(run.payload(), undisturbed_here.payload())
    assert_curves_are_whole(run, steps_per_epoch=11)


VARIANTS = {
    "accumulated": {"OPTIMIZATION.ACCUMULATE": 2},
    "fp16": {"OPTIMIZATION.USE_AMP": True, "OPTIMIZATION.LOSS_SCALE_FP16": 2.0**17},
    "bf16": {"OPTIMIZATION.USE_AMP": True, "OPTIMIZATION.AMP_DTYPE": "bf16"},
    "sgd": {"OPTIMIZATION.OPTIMIZER": "sgd"},
    "adam with warm-up": {"OPTIMIZATION.OPTIMIZER": "adam", "OPTIMIZATION.LR_WARMUP": True},
    "cosine": {"OPTIMIZATION.OPTIMIZER": "adam_cosineanneal"},
    "three virtual workers": {"SCALE.VIRTUAL_WORKERS": 3},
    "unshuffled": {"LOADER.SHUFFLE": False},
    "extra state": {"TASK": "tasks_for_tests:Counting"},
    "split by chance": {"TASK": "tasks_for_tests:SplitByChance"},
    "nothing to evaluate": {
        "TASK": "tasks_for_tests:Unscored",
        "CHECKPOINT.METRIC": None,
        "CHECKPOINT.KEEP_BEST": 0,
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_run_that_failed_resumes_to_the_same_bits_under(tmp_path: Path, changes: dict[str, object]) -> None:
    whole, run = Run(tmp_path / "whole", changes), Run(tmp_path / "failed", changes)
    assert main(whole.words("--num_workers", "0")) == 0
    (run.gate / "fail").write_text("10")
    assert main(run.words("--num_workers", "0")) == 1
    (run.gate / "fail").unlink()
    assert main(run.words("--num_workers", "0")) == 0
    assert run.lines("run")[-1]["step"] >= 4
    assert_same_bits(run.payload(), whole.payload())


@pytest.mark.parametrize("engine", ["flat", "ddp"])
def test_values_that_change_with_an_epoch_give_the_same_bits_however_the_run_came_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    """In one go; stopped at that epoch's beginning; begun without them; and failed in mid-phase."""
    plain = {"OPTIMIZATION.ENGINE": engine}
    first = {"FROM_EPOCH": 1, "LR": 0.04, "GRAD_NORM_CLIP": None, "WEIGHT_DECAY": 0.5}
    phased = {**plain, "OPTIMIZATION.PHASES": [first, {"FROM_EPOCH": 2, "GRAD_NORM_CLIP": 0.25}]}
    whole = Run(tmp_path / "whole", phased)
    assert main(whole.words("--num_workers", "0")) == 0
    for name, begun_with, fails_at in (("stopped", phased, 11), ("begun", plain, 11), ("failed", phased, 26)):
        run = Run(tmp_path / name, begun_with)
        (run.gate / "fail").write_text(str(fails_at))
        assert main(run.words("--num_workers", "0")) == 1
        (run.gate / "fail").unlink()
        capsys.readouterr()
        assert main(Run(tmp_path / name, phased).words("--num_workers", "0")) == 0
        assert "config differs" not in capsys.readouterr().out
        assert run.lines("run")[-1]["step"] == (11 if fails_at == 11 else 24)
        assert_same_bits(run.payload(), whole.payload())
    lrs = [r["lr"] for r in whole.records("step")]
    without = Run(tmp_path / "without", plain)
    assert main(without.words("--num_workers", "0")) == 0
    others = [r["lr"] for r in without.records("step")]
    assert lrs[:11] == others[:11] and lrs[11:] == pytest.approx([4 * lr for lr in others[11:]])  # onecycle: as LR
    assert without.payload()["optimizer_state"]["param_groups"][0]["weight_decay"] == 0.01
    assert whole.payload()["optimizer_state"]["param_groups"][0]["weight_decay"] == 0.5


def test_an_evaluation_that_was_cut_off_is_made_up_for(tmp_path: Path, undisturbed_here: Run) -> None:
    run = Run(tmp_path)
    (run.gate / "spoil_score").touch()
    assert main(run.words("--num_workers", "0")) == 1
    assert run.names()[-1] == "checkpoint_epoch_1"
    (run.gate / "spoil_score").unlink()
    assert main(run.words("--num_workers", "0")) == 0
    assert_same_bits(run.payload(), undisturbed_here.payload())
    assert_curves_are_whole(run, steps_per_epoch=11)


def test_a_run_whose_loader_worker_is_killed_fails_and_then_ends_with_the_same_bits(
    tmp_path: Path, undisturbed_here: Run
) -> None:
    run = Run(tmp_path, {"LOADER.WORKERS": 2, "LOADER.PREFETCH": 1})
    run.hold(14)
    launched = run.start("--num_workers", "0")
    [pid] = run.held(1, launched)
    loaders = wait_for(lambda: loader_workers_of(pid), "loader workers")
    os.kill(loaders[0], signal.SIGKILL)
    wait_for(lambda: not alive(loaders[0]), "its end")
    run.release()
    assert "a loader worker died" in launched.ended(1)
    gone(set(loaders))
    assert main(run.words("--num_workers", "0")) == 0
    assert_same_bits(run.payload(), undisturbed_here.payload())


def written(run: Run) -> list[tuple[Path, int]]:
    """Each file of the run folder and when it was written, but for the one that says who holds it."""
    files = [path for path in sorted(run.run_dir.rglob("*")) if path.is_file() and path.name != ".lock"]
    return [(path, path.stat().st_mtime_ns) for path in files]


@pytest.mark.parametrize("words", [["--num_workers", "0"], ["--num_workers", "2"]], ids=" ".join)
@pytest.mark.parametrize("task", ["Exact", "Unscored"])
def test_a_finished_run_says_so_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, words: list[str]
) -> None:
    run = Run(tmp_path, {"TASK": f"tasks_for_tests:{task}", "CHECKPOINT.METRIC": None, "CHECKPOINT.KEEP_BEST": 0})
    run = Run(tmp_path, {**run.changes, "SCALE.VIRTUAL_WORKERS": 2})
    assert main(run.words("--num_workers", "0")) == 0
    before = written(run)
    capsys.readouterr()
    assert main(run.words(*words)) == 0
    assert f"already complete: all {EPOCHS} epochs" in capsys.readouterr().out
    assert written(run) == before


def test_a_run_under_another_batch_size_goes_on_from_its_own_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)
    (run.gate / "fail").write_text("14")
    assert main(run.words("--num_workers", "0")) == 1  # 11 steps an epoch; newest checkpoint: step 12
    run = Run(tmp_path, {"OPTIMIZATION.BATCH_SIZE_PER_GPU": 8})
    words = run.words("--num_workers", "0", "--allow-config-change")
    (run.gate / "fail").write_text("16")
    assert main(words) == 1  # 6 steps an epoch: goes on at step 6, saves step 8, fails
    (run.gate / "fail").unlink()
    capsys.readouterr()
    assert main(words) == 0
    assert "checkpoint_step_8: epoch 2, after step 8" in capsys.readouterr().out
    assert [r["step"] for r in run.lines("run")] == [0, 6, 8]
    assert main(words) == 0
    assert "already complete" in capsys.readouterr().out
