"""A run keeps its virtual workers for life: however many processes host them, they step to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import Run, assert_curves_are_whole, assert_same_bits, assert_uses_once

from raytrain.cli import main

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_a_run_begun_on_two_workers_goes_on_with_fewer(
    tmp_path: Path, failed_on_two: Run, undisturbed_on_two: Run, ray_address: str, num_workers: str
) -> None:
    run = failed_on_two.copied(tmp_path)
    assert main(run.words("--num_workers", num_workers)) == 0
    assert run.records("run")[-1]["virtual_workers"] == 2
    assert_uses_once(run, virtual_workers=2)
    assert_curves_are_whole(run, steps_per_epoch=6)
    for field in ("step", "epoch", "iteration", "lr", "momentum", "samples"):
        assert column(run, field) == column(undisturbed_on_two, field), field
    assert_same_bits(run.payload(), undisturbed_on_two.payload())


@pytest.mark.parametrize(
    "changes",
    [{"OPTIMIZATION.ENGINE": "flat"}, {"OPTIMIZATION.ENGINE": "ddp", "SCALE.REDUCTION": "collective"}],
    ids=["flat, shared memory", "ddp, collectives"],
)
def test_four_virtual_workers_on_three_processes_and_on_one_agree_to_the_bit(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """With dropout, BatchNorm, augmentation and accumulation; on three: 2, 1 and 1."""
    changes = {
        "SCALE.VIRTUAL_WORKERS": 4,
        "SCALE.CPUS_PER_WORKER": 0.5,
        "OPTIMIZATION.ACCUMULATE": 2,
        "LOADER.WORKERS": 1,
        **changes,
    }
    three, one = (Run(tmp_path / name, changes) for name in ("three", "one"))
    three.run("--num_workers", "3")
    assert main(one.words("--num_workers", "0")) == 0
    for run in (one, three):
        assert_uses_once(run, virtual_workers=4)
    for field in ("step", "epoch", "lr", "momentum", "samples", "loss", "grad_norm"):
        assert column(three, field) == column(one, field), field
    assert_same_bits(three.payload(), one.payload())


def column(run: Run, field: str) -> list[Any]:
    return [record[field] for record in run.records("step")]
