"""Numbers that a GPU computes, read on the host some steps later: asking at once would wait for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

LATE_STEPS = 2  # after these, what a GPU computed has arrived on the host


class LateReader:
    """Small tensors on their way to the host, each handed out LATE_STEPS after it was put in."""

    def __init__(self, first: Sequence[list[float]] = ()) -> None:
        """first: what is handed out first, oldest first."""
        self._under_way: deque[tuple[Any, torch.cuda.Event | None]] = deque((values, None) for values in first)

    def swap(self, tensor: torch.Tensor) -> list[float] | None:
        """Puts `tensor` in; the numbers of the one that was put in LATE_STEPS ago, None if there is none."""
        host, event = tensor.to("cpu", non_blocking=True), None
        if tensor.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._under_way.append((host, event))
        if len(self._under_way) <= LATE_STEPS:
            return None
        host, event = self._under_way.popleft()
        if event is not None and not event.query():
            event.synchronize()
        return list(host.tolist() if isinstance(host, torch.Tensor) else host)
