"""A run keeps its virtual workers for life: fewer processes take the same samples in the same steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Run, assert_curves_are_whole, assert_uses_once

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
    assert_equal_to_rounding(run, undisturbed_on_two)


def test_four_virtual_workers_on_two_processes_and_on_one_agree(tmp_path: Path) -> None:
    two, one = (Run(tmp_path / name, {"SCALE.VIRTUAL_WORKERS": 4}) for name in ("two", "one"))
    two.run("--num_workers", "2")
    assert main(one.words("--num_workers", "0")) == 0
    for run in (one, two):
        assert_uses_once(run, virtual_workers=4)
    for field in ("step", "epoch", "lr", "momentum", "samples"):
        assert column(two, field) == column(one, field), field
    assert_equal_to_rounding(two, one)


def column(run: Run, field: str) -> list[Any]:
    return [record[field] for record in run.records("step")]


def assert_equal_to_rounding(found: Run, expected: Run) -> None:
    """Weights, BatchNorm's buffers and moments; sums of gradients are taken in another order."""
    states = [run.payload() for run in (found, expected)]
    for name in expected.payload()["model_state"]:
        torch.testing.assert_close(*(s["model_state"][name] for s in states), rtol=1e-5, atol=1e-6, msg=name)
    for index, moments in states[1]["optimizer_state"]["state"].items():
        for name in moments:
            pair = (s["optimizer_state"]["state"][index][name] for s in states)
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-7, msg=f"{index} {name}")
