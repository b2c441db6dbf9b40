"""Clips and steps parameter by parameter, with torch's own optimizer: for models that flat buffers cannot hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from raytrain.engine.optim import OptimizerOptions, checked_moments, clip_gradients, set_schedule, torch_optimizer
from raytrain.engine.schedule import StepSettings


class TorchStepper:
    """A Stepper of what stands in `.grad`.

    With fp16, a step whose gradients overflow is left out and the loss scale halved.

    gradients: views that hold each parameter's gradient when a step begins; None: they stand in `.grad`
    """

    kind = "ddp"

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        options: OptimizerOptions,
        scaler: torch.amp.GradScaler,
        gradients: Sequence[torch.Tensor] | None,
        fused: bool = False,
    ) -> None:
        """fused: by torch's fused kernels, which leave a step out without asking the host. Real numbers only."""
        self.optimizer = torch_optimizer(groups, options, fused)
        self.params = [p for group in groups for p in group]
        self._scaler, self._gradients, self._fused = scaler, gradients, fused
        self.row_norms: list[torch.Tensor] = []
        self._start_momentum()

    def norm(self, used: Sequence[bool], divisor: torch.Tensor | None = None) -> torch.Tensor:
        if self._gradients is not None:
            for param, gradient, is_used in zip(self.params, self._gradients, used, strict=True):
                param.grad = gradient if is_used else None
        elif self._fused:
            for param in self.params:
                if param.grad is not None and param.grad.layout is not torch.strided:
                    param.grad = param.grad.to_dense()
        self._scaler.unscale_(self.optimizer)
        self._scaler.update()  # not scaler.step(): what it looks at shows in the norm, and it waits for a GPU
        if divisor is not None:
            torch._foreach_div_([p.grad for p in self.params if p.grad is not None], divisor)
        return clip_gradients(self.params, None)

    def step(self, settings: StepSettings, norm: torch.Tensor, bad: torch.Tensor | None = None) -> None:
        if self._scaler.is_enabled():
            overflow = (norm * 0 != 0).float()
            bad = overflow if bad is None else bad.maximum(overflow)
        if bad is not None and not self._fused and bad.item():  # on a GPU only models with complex parameters wait here
            return
        clip_gradients(self.params, settings.clip, norm)
        set_schedule(self.optimizer, settings)
        if self._fused:  # what GradScaler hands to a fused optimizer
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad  # type: ignore[attr-defined]
        self.optimizer.step()

    def are_finite(self) -> torch.Tensor:
        norms = torch._foreach_norm([p.detach() for p in self.params])
        return torch.stack([norm.double() for norm in norms]).isfinite().all()

    def in_bad_rows(self, row_norms: Sequence[torch.Tensor]) -> list[nn.Parameter]:
        """Nothing is known of rows here."""
        return []

    def state_dict(self, live: bool = False) -> dict[str, Any]:
        """Torch's own: the tensors are those that steps change, `live` or not."""
        return self.optimizer.state_dict()

    def state_changed(self) -> None:
        """Nothing is kept here that depends on the state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Tensors are copied."""
        own = self.optimizer.state_dict()["param_groups"]
        moments = {
            position: {name: value.clone() if torch.is_tensor(value) else value for name, value in entry.items()}
            for position, entry in checked_moments(state, own, self.params).items()
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": own})
        self._start_momentum()

    def _start_momentum(self) -> None:
        """Fused SGD would begin with whatever lies in memory if its first step is left out."""
        if self._fused and isinstance(self.optimizer, torch.optim.SGD) and self.optimizer.defaults["momentum"]:
            for param in self.params:
                if self.optimizer.state[param].get("momentum_buffer") is None:
                    self.optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
