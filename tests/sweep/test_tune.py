"""`raytrain tune` on real Ray: what some of its trials come to does not end the others."""

from __future__ import annotations

from pathlib import Path

import pytest

import raytrain
from raytrain.sweep.tune import SweepOptions, tune

pytestmark = pytest.mark.ray

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_trial_that_diverges_does_not_end_the_sweep(
    tmp_path: Path, ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["OUTPUT", "here", "OPTIMIZATION.NUM_EPOCHS", "2", "TUNE.MAX_FAILED", "0"]
    space = ["TUNE.SPACE", "{OPTIMIZATION.LR: {grid: [1e6, 1e-2]}, OPTIMIZATION.GRAD_NORM_CLIP: {grid: [1e9]}}"]
    cfg = raytrain.load_config(CONFIGS / "sweep_clip_lr.yaml", [*words, *space])
    result = tune(cfg, SweepOptions())
    diverged, good = result.view.trials[0], result.view.trials[1]
    assert (result.status, diverged.state, diverged.why) == ("finished", "failed", "diverged")
    assert "finite" in str(diverged.error) or "such steps in a row" in str(diverged.error)
    assert result.view.best is good
    assert Path(str(diverged.logs), "rank_0.log").is_file()  # where the ledger says that its output is
    assert result.best is not None and str(tmp_path / "here") == result.best.OUTPUT  # best.yaml trains from any folder
