"""Clips and steps parameter by parameter, with torch's own optimizer: for models that flat buffers cannot hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from raytrain.clip import clip_gradients
from raytrain.optim import Options, checked_moments, set_schedule, torch_optimizer


class TorchStepper:
    """Steps what stands in `.grad`; with fp16, the loss scaler may skip a step.

    gradients: views that hold each parameter's gradient when a step begins; None: they stand in `.grad`
    """

    kind = "ddp"

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        options: Options,
        scaler: torch.amp.GradScaler,
        gradients: Sequence[torch.Tensor] | None,
    ) -> None:
        self.optimizer = torch_optimizer(groups, options)
        self.params = [p for group in groups for p in group]
        self._scaler, self._gradients = scaler, gradients

    def step(self, used: Sequence[bool], lr: float, momentum: float | None, max_norm: float | None) -> torch.Tensor:
        """The L2 norm of the gradients before clipping, a scalar on the device; without a host sync.

        used: for each parameter, whether it has a gradient; one that has none stays as it is
        """
        if self._gradients is not None:
            for param, gradient, is_used in zip(self.params, self._gradients, used, strict=True):
                param.grad = gradient if is_used else None
        self._scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.params, max_norm)
        set_schedule(self.optimizer, lr, momentum)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return norm

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the moments of a state_dict, ours or OpenPCDet's; all settings stay this run's. Tensors are copied.

        CheckpointError if it is of another kind of optimizer or of another model; then nothing changes.
        """
        own = self.optimizer.state_dict()["param_groups"]
        moments = {
            position: {name: value.clone() if torch.is_tensor(value) else value for name, value in entry.items()}
            for position, entry in checked_moments(state, own, self.params).items()
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": own})
