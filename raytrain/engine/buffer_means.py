"""`OPTIMIZATION.BUFFERS: mean`: after a step, buffers are the mean over the virtual workers instead of the first one's.

The values that each virtual worker leaves are added by the tree, behind the gradients (engine/tail.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from raytrain.errors import TaskError


class Place(NamedTuple):
    """A buffer of a model: `name` of `module`, as it was when training began."""

    module: nn.Module
    name: str
    path: str
    shape: torch.Size
    dtype: torch.dtype


class BufferMeans:
    """The buffers of `model` that have a mean: of floating-point numbers, and part of its state dict.

    Counts (num_batches_tracked) and caches that no checkpoint holds stay virtual worker 0's.

    numbers: that they hold together
    rows:    the values that each virtual worker here has left in this step, each (numbers,)
    """

    def __init__(self, model: nn.Module) -> None:
        self._places, seen = [], set()
        for path, module in model.named_modules():
            for name, buffer in module._buffers.items():
                is_state = buffer is not None and name not in module._non_persistent_buffers_set
                if is_state and buffer.is_floating_point() and id(buffer) not in seen:
                    seen.add(id(buffer))
                    path_of_buffer = f"{path}.{name}" if path else name
                    self._places.append(Place(module, name, path_of_buffer, buffer.shape, buffer.dtype))
        self._sizes = [place.shape.numel() for place in self._places]
        self.numbers = sum(self._sizes)
        self.rows: list[torch.Tensor] = []

    @property
    def is_f64(self) -> bool:
        """Whether some hold f64, in which they are then added."""
        return any(place.dtype is torch.float64 for place in self._places)

    def begin_step(self) -> None:
        self.rows = []

    def virtual_worker_done(self) -> None:
        """Keep what it leaves."""
        self.rows.append(torch.cat([self._value(place).reshape(-1) for place in self._places]))

    @torch.no_grad()
    def take(self, mean: torch.Tensor) -> None:
        """They become `mean`, (numbers,)."""
        for place, part in zip(self._places, mean.split(self._sizes), strict=True):
            self._value(place).copy_(part.view(place.shape))

    def _value(self, place: Place) -> torch.Tensor:
        value = place.module._buffers.get(place.name)
        if value is None or value.shape != place.shape or value.dtype is not place.dtype:
            found = "gone" if value is None else f"{tuple(value.shape)} of {value.dtype}"
            raise TaskError(
                f"OPTIMIZATION.BUFFERS is mean, but buffer {place.path} was {tuple(place.shape)} of {place.dtype} when "
                f"training began and is {found} now. Set OPTIMIZATION.BUFFERS to first, or register the buffer with "
                "persistent=False"
            )
        return value.detach()
