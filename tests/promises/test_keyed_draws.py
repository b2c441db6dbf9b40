"""Promise 1 where data set, task and collate own generators, behind others: two processes draw what one draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import torchrun
from runs import Run, assert_same_bits

from raytrain.cli import main

pytestmark = pytest.mark.ray

# Three steps make an epoch.
CHANGES = {"TASK": "own_generators:DrawsBehind", "DATA_CONFIG.NUM_SAMPLES": 22, "SCALE.VIRTUAL_WORKERS": 2}


def trained(run: Run) -> dict[str, Any]:
    return {part: run.payload()[part] for part in ("model_state", "optimizer_state")}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process trains, without loader workers and in one go."""
    run = Run(tmp_path_factory.mktemp("here"), CHANGES)
    assert main(run.words("--num_workers", "0")) == 0
    return trained(run)


@pytest.mark.parametrize("by", ["Ray", "torchrun"])
def test_two_processes_draw_what_one_does_without_loader_workers_and_resumed_with_them(
    by: str, tmp_path: Path, here: dict[str, Any]
) -> None:
    def launch(*flags: str, status: int = 0) -> str:
        if by == "Ray":
            return run.run(*flags, "--num_workers", "2", status=status)  # a cluster of its own starts fastest
        return torchrun(["-m", "raytrain", *run.words(*flags)], tmp_path).ended(status)

    run = Run(tmp_path, CHANGES)
    (run.gate / "fail").write_text("5")
    said = launch("--workers", "0", status=1)
    (run.gate / "fail").unlink()
    assert run.names()[-1] == "checkpoint_step_4"  # in mid-epoch
    said += launch("--workers", "2")  # which are told of the epochs before, too
    assert "note:" not in said, said
    assert_same_bits(trained(run), here)
