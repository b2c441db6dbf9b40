"""A TMPDIR too long for the path of a socket, as clusters and CI give some, is none of a run's business."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import Run, assert_same_bits

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_with_loader_workers_trains_there_and_leaves_nothing(
    tmp_path: Path, workers: str, request: pytest.FixtureRequest
) -> None:
    undisturbed: Run = request.getfixturevalue("undisturbed_on_two" if workers == "2" else "undisturbed_here")
    temp_dir = tmp_path / ("long_" * 20)
    temp_dir.mkdir()
    run = Run(tmp_path, {"LOADER.WORKERS": 1})
    run.start("--num_workers", workers, env={"TMPDIR": str(temp_dir)}).ended(0)
    assert_same_bits(run.payload(), undisturbed.payload())
    assert list(temp_dir.iterdir()) == []
