"""Mixed precision: where autocast applies, how fp16's loss is scaled, and whether f32 products may be TF32."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def set_tf32(allowed: bool) -> None:
    """Whether CUDA may round the factors of f32 products to TF32; torch's default is no in a matmul, yes in cuDNN."""
    set_fp32_precisions(["tf32" if allowed else "ieee"] * 3)


def fp32_precisions() -> list[str]:
    """Of CUDA's matrix products, convolutions and recurrent layers."""
    return [part.fp32_precision for part in _fp32_parts()]


def set_fp32_precisions(names: Sequence[str]) -> None:
    """In the order of fp32_precisions; by torch's older flags too, as reading those raises where the two disagree."""
    torch.backends.cuda.matmul.allow_tf32 = names[0] == "tf32"
    torch.backends.cudnn.allow_tf32 = names[1] == "tf32"
    for part, name in zip(_fp32_parts(), names, strict=True):
        part.fp32_precision = name


def _fp32_parts() -> list[Any]:
    backends: Any = torch.backends  # its stubs know neither conv nor rnn
    return [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]


class Precision:
    """Autocast for the forward pass, and the loss scaler that fp16 needs.

    fp16 scales the loss by LOSS_SCALE_FP16 (65536 unless given), halves it after an overflow and
    skips that step; the scaler is part of the checkpoint, one scaler for the whole run (the
    heritage makes a new one each epoch and so skips steps there).
    """

    def __init__(self, optim_cfg: Any, device: torch.device) -> None:
        self.dtype = AMP_DTYPES[optim_cfg.AMP_DTYPE] if optim_cfg.USE_AMP else None
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
