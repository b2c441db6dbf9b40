"""Promise 1 where task and model hold more than is trained: a count, a momentum copy, a queue, a frozen teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import Run, assert_same_bits

pytestmark = pytest.mark.ray

CHANGES = {"TASK": "tasks_with_state:Holding", "LOADER.WORKERS": 1, "CHECKPOINT.SNAPSHOT_EVERY": 1}


def test_a_run_on_two_workers_of_which_one_is_killed_ends_with_the_same_bits(tmp_path: Path, ray_address: str) -> None:
    """What it goes on from is in memory, or the checkpoint of step 8."""
    flags = ["--num_workers", "2", "--address", ray_address]
    whole, run = Run(tmp_path / "whole", CHANGES), Run(tmp_path / "killed", CHANGES)
    said = whole.run(*flags)
    assert said.count("parameters that forward itself changes") == said.count("while training: teacher") == 1
    assert "is in no checkpoint" not in said
    run.with_a_worker_killed_at(9, ray_address, rank=0)
    assert_same_bits(run.payload(), whole.payload())
    assert run.payload()["raytrain"]["own"] == {"task": {"steps": 18}}
    state = run.payload()["model_state"]
    assert not state["teacher.1.running_mean"].any() and state["queue"].any()
