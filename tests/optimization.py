"""What the engine reads of OPTIMIZATION, for tests that build one by hand; each changes what it is about."""

from __future__ import annotations

from typing import Any

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
    "NONFINITE": "skip",
    "NONFINITE_LIMIT": 10,
    "ROLLBACK_EVERY": 100,
    "SPIKE": None,
}
