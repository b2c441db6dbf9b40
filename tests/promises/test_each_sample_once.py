"""Promise 2: each sample exactly once per epoch, whatever fails in between (on fewer workers: test_virtual_workers)."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import LEDGER, Run, assert_each_sample_once

from raytrain.cli import main

pytestmark = pytest.mark.ray


def test_each_sample_is_used_once_per_epoch_however_often_the_run_fails(tmp_path: Path) -> None:
    run = Run(tmp_path, LEDGER)
    for step in (3, 10, 11, 14, 22, 32):
        (run.gate / "fail").write_text(str(step))
        assert main(run.words("--num_workers", "0")) == 1
    (run.gate / "fail").unlink()
    assert main(run.words("--num_workers", "0")) == 0
    assert_each_sample_once(run.payload(), virtual_workers=1)
