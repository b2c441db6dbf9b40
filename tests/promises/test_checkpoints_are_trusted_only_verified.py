"""Promise 3: a damaged checkpoint is named and passed over, and training never starts over silently."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import wait_for
from runs import Run, assert_curves_are_whole, assert_same_bits

from raytrain.cli import main

pytestmark = pytest.mark.ray

NEWEST, BEFORE = "checkpoint_step_12", "checkpoint_epoch_1"  # of a run that failed in its 15th step


def tear(checkpoint: Path) -> None:
    cut(checkpoint / "checkpoint.pth", keep=0.5)


def empty(checkpoint: Path) -> None:
    cut(checkpoint / "checkpoint.pth", keep=0.0)


def cut(file: Path, keep: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


def flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "checkpoint.pth"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def append_a_byte(checkpoint: Path) -> None:
    with (checkpoint / "checkpoint.pth").open("ab") as file:
        file.write(b"\0")


def remove_weights(checkpoint: Path) -> None:
    (checkpoint / "checkpoint.pth").unlink()


def remove_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def tear_manifest(checkpoint: Path) -> None:
    cut(checkpoint / "manifest.json", keep=0.5)


def falsify_manifest(checkpoint: Path) -> None:
    """It is whole, and says another step."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["progress"]["step"] += 1
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def exchange_weights(checkpoint: Path) -> None:
    """A whole file of the same size, but the one of the checkpoint before."""
    shutil.copyfile(checkpoint.parent / BEFORE / "checkpoint.pth", checkpoint / "checkpoint.pth")


def remove_all(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)


DAMAGES = [
    tear,
    empty,
    flip_a_bit,
    append_a_byte,
    remove_weights,
    remove_manifest,
    tear_manifest,
    falsify_manifest,
    exchange_weights,
    remove_all,
]
every_damage = pytest.mark.parametrize("damage", DAMAGES, ids=[d.__name__ for d in DAMAGES])


@every_damage
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    undisturbed_here: Run,
    failed_here: Run,
    damage: Callable[[Path], None],
) -> None:
    run = failed_here.copied(tmp_path)
    damage(run.ckpt / NEWEST)
    capsys.readouterr()
    assert main(run.words("--num_workers", "0")) == 0
    said = capsys.readouterr().out
    assert f"passed over {NEWEST}" in said
    assert f"ckpt/{BEFORE}: epoch 2, after step 11" in said
    assert any(NEWEST in event["message"] for event in run.records("event"))
    assert run.lines("run")[-1]["step"] == 11
    assert_same_bits(run.payload(), undisturbed_here.payload())
    assert_curves_are_whole(run, steps_per_epoch=11)


def test_of_several_damaged_checkpoints_each_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], undisturbed_here: Run, failed_here: Run
) -> None:
    run = failed_here.copied(tmp_path)
    flip_a_bit(run.ckpt / NEWEST)
    tear_manifest(run.ckpt / BEFORE)
    capsys.readouterr()
    assert main(run.words("--num_workers", "0")) == 0
    said = capsys.readouterr().out
    assert f"passed over {NEWEST}" in said
    assert f"passed over {BEFORE}" in said
    assert_same_bits(run.payload(), undisturbed_here.payload())


@every_damage
def test_when_no_checkpoint_can_be_trusted_the_run_refuses_to_start_over(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    failed_here: Run,
    ray_address: str,  # else a cluster would start for each refusal
    damage: Callable[[Path], None],
) -> None:
    run = failed_here.copied(tmp_path)
    names = run.names()
    for name in sorted(names, reverse=True):  # exchange_weights copies from BEFORE: that one goes last
        (damage if name != BEFORE or damage is not exchange_weights else tear)(run.ckpt / name)
    before = {p: p.read_bytes() for p in sorted(run.ckpt.rglob("*")) if p.is_file()}
    capsys.readouterr()
    for num_workers in ("0", "1"):
        assert main(run.words("--num_workers", num_workers)) == 1
        said = capsys.readouterr().err
        assert "never starts over silently" in said
        assert "--resume never --overwrite" in said
        assert NEWEST in said
    assert {p: p.read_bytes() for p in sorted(run.ckpt.rglob("*")) if p.is_file()} == before
    assert main(run.words("--num_workers", "0", "--resume", "never", "--overwrite", "--epochs", "1")) == 0


def test_a_run_killed_before_its_first_checkpoint_starts_at_step_0(tmp_path: Path, undisturbed_here: Run) -> None:
    run = Run(tmp_path)
    (run.gate / "fail").write_text("3")
    assert main(run.words("--num_workers", "0")) == 1
    assert run.names() == []
    (run.gate / "fail").unlink()
    assert main(run.words("--num_workers", "0")) == 0
    assert_same_bits(run.payload(), undisturbed_here.payload())
    assert_curves_are_whole(run, steps_per_epoch=11)


def test_two_workers_pass_over_a_damaged_checkpoint_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], undisturbed_on_two: Run, failed_on_two: Run, ray_address: str
) -> None:
    run = failed_on_two.copied(tmp_path)
    flip_a_bit(run.ckpt / "checkpoint_step_8")
    assert main(run.words("--num_workers", "2")) == 0
    assert "passed over checkpoint_step_8" in capsys.readouterr().out
    assert_same_bits(run.payload(), undisturbed_on_two.payload())
    assert_curves_are_whole(run, steps_per_epoch=6)


def test_starting_over_waits_for_a_run_that_still_trains(tmp_path: Path, undisturbed_here: Run) -> None:
    run = Run(tmp_path)
    run.hold(14)
    first = run.start("--num_workers", "0")
    run.held(1, first)
    second = run.start("--num_workers", "0", "--resume", "never", "--overwrite")
    wait_for(lambda: has_open(second.pid, run.run_dir / ".lock"), "the second one at the lock")
    assert run.names()[-2:] == [BEFORE, NEWEST]
    run.release()
    first.ended(0)
    second.ended(0)
    assert_same_bits(run.payload(), undisturbed_here.payload())
    assert_curves_are_whole(run, steps_per_epoch=11)
    assert len(list((run.ckpt / "superseded").glob("*/checkpoint_epoch_3"))) == 1  # the first one's, untouched


def has_open(pid: int, file: Path) -> bool:
    """True if the process has the file open at this moment; its other files come and go meanwhile."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if link.readlink() == file:
                return True
    return False
