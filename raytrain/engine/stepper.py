"""What the engine asks of an optimizer: FlatStepper (engine/flat.py) or TorchStepper (engine/per_parameter.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from raytrain.engine.schedule import StepSettings


class Stepper(Protocol):
    """Clips the summed gradients and steps the parameters. For each step `norm` comes first, then `step`.

    kind:      OPTIMIZATION.ENGINE's word for it
    params:    what it steps, in the order of the optimizer state
    row_norms: of the newest step, by dtype: (rows,), where gradients lie in flat buffers
    """

    kind: str
    params: list[nn.Parameter]
    row_norms: list[torch.Tensor]

    def norm(self, used: Sequence[bool], divisor: torch.Tensor | None = None) -> torch.Tensor:
        """The L2 norm of the gradients that `step` will take: a scalar on the device, without a host sync.

        used:    for each parameter, whether it has a gradient; one that has none stays as it is
        divisor: a scalar on the device, by which the gradients are divided first
        """
        ...

    def step(self, settings: StepSettings, norm: torch.Tensor, bad: torch.Tensor | None = None) -> None:
        """Clips by `norm` and steps. bad: a f32 scalar on the device; if it is 1, nothing changes, to the bit."""
        ...

    def are_finite(self) -> torch.Tensor:
        """Whether all values that are stepped are finite: a scalar on the device."""
        ...

    def in_bad_rows(self, row_norms: Sequence[torch.Tensor]) -> list[nn.Parameter]:
        """Those of which a part lies in a row of the gradient whose norm is not finite. Waits for the device."""
        ...

    def state_dict(self, live: bool = False) -> dict[str, Any]:
        """As torch's optimizer over the same groups would give it.

        live: the tensors are (views of) the memory that steps change, nothing is copied
        """
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the moments of a state_dict of torch's form, ours or OpenPCDet's; all settings stay this run's.

        CheckpointError if it is of another kind of optimizer or of another model; then nothing changes.
        """
        ...

    def state_changed(self) -> None:
        """To be called when tensors of state_dict(live=True) have been changed from outside."""
        ...
