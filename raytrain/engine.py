"""What happens to gradients: combined over the virtual workers, clipped, stepped.

The loop hands losses in and gets a step out; how gradients travel is this module's alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from raytrain.clip import clip_gradients
from raytrain.optim import set_schedule
from raytrain.precision import Precision
from raytrain.world import World


@dataclasses.dataclass(frozen=True)
class Stepped:
    """What one step leaves behind: device scalars, not yet read, and what the ranks agreed on.

    loss:      mean over all micro-batches of all virtual workers
    grad_norm: L2 over the stepped parameters, before clipping
    wishes:    for each wish of `Engine.step`, whether some rank had it
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    wishes: tuple[bool, ...]


class Engine:
    """Gradients of all virtual workers -> one optimizer step, the same on every process.

    One reduction of one buffer per dtype and step; the loss and the ranks' wishes (stop, save)
    ride in its tail, so agreeing on them costs no collective of its own.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        grad_norm_clip: float | None,
        world: World,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.grad_norm_clip = grad_norm_clip
        self.world = world
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.loss_sum = torch.zeros((), device=world.device)
        self._kept: list[torch.Tensor] = []
        self._first_done = False
        self._late_wishes: list[tuple[torch.Tensor, torch.cuda.Event]] = []

    def zero_grad(self) -> None:
        """Forget the gradients of every parameter, stepped or not (the heritage forgets some not, D6)."""
        for param in self.trainable:
            param.grad = None
        self.loss_sum = torch.zeros((), device=self.world.device)
        self._first_done = False
        self._kept = self._copied_buffers() if len(self.world.block) > 1 else []

    @contextmanager
    def virtual_worker(self) -> Iterator[None]:
        """The forward passes of one hosted virtual worker, with buffers (BatchNorm statistics) of its own.

        Each starts from the buffers the step began with; the first one's remain. Over all
        processes those are virtual worker 0's, as DistributedDataParallel broadcasts rank 0's.
        """
        if not self._first_done:
            self._first_done = True
            yield
            return
        firsts = self._copied_buffers()
        self._set_buffers(self._kept)
        try:
            yield
        finally:
            self._set_buffers(firsts)

    def backward(self, loss: torch.Tensor, share: float) -> None:
        """Add `share` of this loss's gradient (and of the loss, for the journal) to the step."""
        self.loss_sum = self.loss_sum + loss.detach() * share
        scaled: Any = self.precision.scaler.scale(loss * share)
        scaled.backward()

    def step(self, lr: float, momentum: float | None, wishes: Sequence[bool]) -> Stepped:
        """Collective. Combine, clip and step; `wishes` are this rank's."""
        granted = tuple(wishes)
        if self.world.size > 1:
            granted = self._combine(granted)
            self._broadcast_buffers()
        scaler = self.precision.scaler
        scaler.unscale_(self.optimizer)
        grad_norm = clip_gradients(self.params, self.grad_norm_clip)
        set_schedule(self.optimizer, lr, momentum)
        scaler.step(self.optimizer)
        scaler.update()
        return Stepped(self.loss_sum, grad_norm, granted)

    def _buffers(self) -> list[torch.Tensor]:
        """Looked up each time: a module may put another tensor in a buffer's place."""
        return [buffer.detach() for buffer in self.model.buffers() if buffer.numel()]

    def _copied_buffers(self) -> list[torch.Tensor]:
        return [buffer.clone() for buffer in self._buffers()]

    def _set_buffers(self, values: list[torch.Tensor]) -> None:
        for buffer, value in zip(self._buffers(), values, strict=True):
            buffer.copy_(value)

    def _combine(self, wishes: tuple[bool, ...]) -> tuple[bool, ...]:
        """Sum gradients over the processes. A parameter unused by every process keeps no gradient."""
        device = self.world.device
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for param in self.params:
            by_dtype.setdefault(param.dtype, []).append(param)
        used = torch.tensor([p.grad is not None for p in self.params], dtype=torch.float32)
        tail = torch.cat([used, torch.tensor(wishes, dtype=torch.float32)]).to(device, non_blocking=True)
        tail = torch.cat([tail, self.loss_sum.float().reshape(1)])
        for dtype, params in by_dtype.items():
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            pieces = [g.reshape(-1) for g in grads]
            carries_tail = dtype is torch.float32
            flat = torch.cat([*pieces, tail] if carries_tail else pieces)
            self.world.sum_(flat)
            if carries_tail:
                flat, tail = flat[: -len(tail)], flat[-len(tail) :]
            for grad, part in zip(grads, flat.split([p.numel() for p in params]), strict=True):
                grad.copy_(part.view_as(grad))
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
        if torch.float32 not in by_dtype:
            self.world.sum_(tail)
        self.loss_sum = tail[-1]
        counts = tail[: len(self.params)]
        if device.type == "cpu":  # on a GPU asking would wait for it; there unused parameters get zero gradients
            for param, count in zip(self.params, counts.tolist(), strict=True):
                if count == 0:
                    param.grad = None
        return self._read_wishes(tail[len(self.params) : -1])

    def _read_wishes(self, summed: torch.Tensor) -> tuple[bool, ...]:
        """The wishes of all ranks. On a GPU those of two steps ago, which have arrived without waiting."""
        if summed.device.type == "cpu":
            return tuple(count > 0 for count in summed.tolist())
        host = summed.to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._late_wishes.append((host, event))
        if len(self._late_wishes) < 3:
            return (False,) * len(summed)
        host, event = self._late_wishes.pop(0)
        event.synchronize()
        return tuple(count > 0 for count in host.tolist())

    def _broadcast_buffers(self) -> None:
        """Collective. Every process gets rank 0's buffers, all dtypes in one message."""
        buffers = self._buffers()
        if not buffers:
            return
        packed = torch.cat([b.contiguous().reshape(-1).view(torch.uint8) for b in buffers])
        self.world.broadcast_(packed)
        sizes = [b.numel() * b.element_size() for b in buffers]
        for buffer, part in zip(buffers, packed.split(sizes), strict=True):
            buffer.copy_(part.clone().view(buffer.dtype).view_as(buffer))
