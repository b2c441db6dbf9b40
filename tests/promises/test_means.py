"""What a step means does not depend on who takes its parts: two workers on Ray, or one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import Run

from raytrain.cli import main

pytestmark = pytest.mark.ray

CHANGES = {
    "TASK": "tasks_for_means:Tokens",
    "SCALE.VIRTUAL_WORKERS": 2,
    "OPTIMIZATION.ACCUMULATE": 2,
    "OPTIMIZATION.OPTIMIZER": "adamw",
    "LOADER.LAST": "pad",
    "LOADER.WORKERS": 2,
    "CHECKPOINT.METRIC": "loss",
    "CHECKPOINT.MODE": "min",
    "LOG.EVERY": 2,
}


def test_weights_terms_and_padded_batches_are_the_same_for_two_workers_and_for_one_process(tmp_path: Path) -> None:
    two, one = (Run(tmp_path / name, CHANGES) for name in ("two", "one"))
    two.run("--num_workers", "2")
    assert main(one.words("--num_workers", "0")) == 0
    steps = [run.records("step") for run in (two, one)]
    fields = ("step", "epoch", "samples", "loss", "grad_norm", "terms", "disp")
    told = [[{field: step[field] for field in fields} for step in each] for each in steps]
    assert told[0] == told[1]
    assert {step["samples"] for step in steps[0]} == {16, 8}  # 33 samples padded to 40
    for step in steps[0]:
        assert sum(step["terms"].values()) == pytest.approx(step["loss"], rel=1e-5)
    torch.testing.assert_close(*(run.payload()["model_state"] for run in (two, one)), rtol=0, atol=0)
    torch.testing.assert_close(*([e["metrics"] for e in run.records("eval")] for run in (two, one)), rtol=0, atol=0)
