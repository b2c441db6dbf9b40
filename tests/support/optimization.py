"""What an engine and its steps are given, for tests that build one by hand and change what they are about."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from raytrain.engine.schedule import StepSettings

OPTIMIZATION: dict[str, Any] = {
    "WEIGHT_DECAY": 0.05,
    "MOMS": [0.95, 0.85],
    "BETAS": None,
    "MOMENTUM": 0.9,
    "LEGACY_PARAM_GROUPS": False,
    "USE_AMP": False,
    "AMP_DTYPE": "fp16",
    "LOSS_SCALE_FP16": None,
    "ENGINE": "auto",
    "BUFFERS": "first",
    "NONFINITE": "skip",
    "NONFINITE_LIMIT": 10,
    "ROLLBACK_EVERY": 100,
    "SPIKE": None,
}


def optim_cfg(**changes: Any) -> SimpleNamespace:
    """OPTIMIZATION with these changes, as a config holds it."""
    return SimpleNamespace(**{**OPTIMIZATION, **changes})


def settings(
    lr: float = 0.1, momentum: float | None = None, clip: float | None = None, weight_decay: float | None = None
) -> StepSettings:
    """weight_decay: None: that of OPTIMIZATION"""
    return StepSettings(lr, momentum, clip, OPTIMIZATION["WEIGHT_DECAY"] if weight_decay is None else weight_decay)
