"""Mixed precision: where autocast applies and how fp16's loss is scaled."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Precision:
    """Autocast for the forward pass, and the loss scaler that fp16 needs.

    fp16 scales the loss by LOSS_SCALE_FP16 (65536 unless given), halves it after an overflow and
    skips that step; the scaler is part of the checkpoint, one scaler for the whole run (the
    heritage makes a new one each epoch and so skips steps there, D12).
    """

    def __init__(self, optim_cfg: Any, device: torch.device) -> None:
        self.dtype = DTYPES[optim_cfg.AMP_DTYPE] if optim_cfg.USE_AMP else None
        self.device = device
        scaled = self.dtype is torch.float16
        init_scale = float(optim_cfg.LOSS_SCALE_FP16 or 65536.0)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=init_scale, enabled=scaled)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler.is_enabled() and state:
            self.scaler.load_state_dict(state)
