"""Gradient clipping by the global L2 norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def clip_gradients(
    parameters: Iterable[torch.Tensor], max_norm: float | None, norm: torch.Tensor | None = None
) -> torch.Tensor:
    """The L2 norm over all gradients before clipping: a scalar on their device, without a host sync.

    The gradients are scaled in place by min(1, max_norm / (norm + 1e-6)), as clip_grad_norm_ does;
    not at all if max_norm is None. A norm that is not finite makes every gradient so: look at it
    before the step. Pass exactly the parameters that are stepped: gradients that no step uses and
    no step zeroes would shrink all others.

    norm: if it is known already
    """
    stepped = list(parameters)
    if norm is None:
        norm = get_total_norm([p.grad for p in stepped if p.grad is not None])
    if max_norm is not None:
        clip_grads_with_norm_(stepped, max_norm, norm)
    return norm
