"""A model's buffers (BatchNorm statistics, caches) over a step: each virtual worker's own, virtual worker 0's after it.

`OPTIMIZATION.BUFFERS: mean` has some of them become the mean instead (engine/buffer_means.py).

So are parameters that forward changes by itself: a momentum encoder, a queue, an embedding with max_norm. Which these
are shows in the run's first steps, and is kept in checkpoints.

A module may put another tensor, of another shape even, in a buffer's place at any time. So they are looked up anew,
and a buffer takes over only a value of its own shape and dtype.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from raytrain.engine.buffer_means import BufferMeans

LOOKS = 3  # a momentum encoder begins as a copy, so the first step does not move it, nor the next where LR begins at 0


class ModuleBuffers:
    """The buffers of `model`: what a step begins with is kept, so that each virtual worker begins with it.

    After a step they are virtual worker 0's, as DistributedDataParallel broadcasts rank 0's; after a bad one, what the
    step began with. One that a module makes anew in another shape (a cache that grows) stays what it made.

    parameters: names of the parameters that are buffers too, as far as is known
    looks_left: in so many steps it is looked whether there are more
    means:      those that become the mean over the virtual workers instead; None: none does
    """

    def __init__(self, model: nn.Module, have_means: bool = False) -> None:
        means = BufferMeans(model) if have_means else None
        self.means = means if means is not None and means.numbers else None
        self.parameters: list[str] = []
        self.looks_left = LOOKS
        self._all_parameters = dict(model.named_parameters())
        self._changing: dict[str, torch.Tensor | None] = {}  # those parameters that are known to change by now
        self._dicts = [*(module._buffers for module in model.modules()), self._changing]
        self._parameters_at_start: dict[str, torch.Tensor] = {}  # on the host, only while it is found out
        self._objects: list[torch.Tensor] = []
        self._places: list[tuple[int, torch.Size]] = []
        self._tensors: dict[tuple[int, str], torch.Tensor] = {}
        self._at_start = Snapshot({})
        self._first_done = False  # whether the first virtual worker of this step has run

    def tensors(self) -> dict[tuple[int, str], torch.Tensor]:
        """Those that can be written to, by module and name; the same dict while no module puts another in place."""
        if not (self._tensors or any(self._dicts)):
            return self._tensors
        objects = [buffer for named in self._dicts for buffer in named.values() if buffer is not None]
        places = [(b.data_ptr() if b.layout is torch.strided else 0, b.shape) for b in objects]
        if places == self._places and all(map(operator.is_, objects, self._objects)):
            return self._tensors
        tensors = {}
        seen: set[int] = set()
        for index, named in enumerate(self._dicts):
            for name, buffer in named.items():
                if buffer is not None and id(buffer) not in seen and buffer.numel() and is_writable(buffer):
                    seen.add(id(buffer))
                    tensors[index, name] = buffer.detach()
        self._objects, self._places, self._tensors = objects, places, tensors
        return tensors

    def begin_step(self) -> None:
        """Keep what they are now."""
        self._first_done = False
        if self.means is not None:
            self.means.begin_step()
        tensors = self.tensors()
        if self._at_start.of is not tensors:
            self._at_start = Snapshot(tensors)
        self._at_start.take()
        if self.looks_left:
            self._parameters_at_start = {
                name: param.detach().to("cpu", copy=True) for name, param in self._all_parameters.items()
            }

    @contextmanager
    def virtual_worker(self) -> Iterator[None]:
        """The forward passes of one virtual worker: it begins with what the step began with, the first one's remain."""
        if not self._first_done:
            self._first_done = True
            yield
            self._look_at_parameters()
            self._keep_for_mean()
            return
        firsts = {key: buffer.clone() for key, buffer in self.tensors().items()}
        self.put_back()
        try:
            yield
            self._keep_for_mean()
        finally:
            self.take_over({**firsts, **self._look_at_parameters()})

    def _keep_for_mean(self) -> None:
        if self.means is not None:
            self.means.virtual_worker_done()

    def take_over(self, values: Mapping[tuple[int, str], torch.Tensor]) -> None:
        """Each becomes its value among `values`, where that fits."""
        copy_fitting(self.tensors(), values)

    def put_back(self) -> None:
        """They become what the step began with."""
        self.take_over(self._at_start.values)

    def parameter_tensors(self) -> dict[tuple[int, str], torch.Tensor]:
        """Of `tensors`, those that are parameters."""
        return {key: tensor for key, tensor in self.tensors().items() if key[0] == len(self._dicts) - 1}

    @contextmanager
    def parameters_kept(self) -> Iterator[None]:
        """What forward does to parameters in here is undone at the end."""
        names = self._all_parameters if self.looks_left else self.parameters
        params = [self._all_parameters[name] for name in names]
        before = [(param.data, param.detach().to("cpu", copy=True)) for param in params]
        try:
            yield
        finally:
            for param, (data, value) in zip(params, before, strict=True):
                data.copy_(value)
                if param.data_ptr() != data.data_ptr():
                    param.data = data

    def changed_parameters(self) -> list[str]:
        """Names of those that forward has changed up to now."""
        return list(self._changing)

    def follow(self, parameters: Iterable[str], looks_left: int) -> None:
        """These are buffers from now on; names that the model has not are left out."""
        self.looks_left = looks_left
        self.parameters = [name for name in self._all_parameters if name in set(parameters)]
        self._add(self.parameters)
        self._parameters_at_start = {}

    def _look_at_parameters(self) -> dict[tuple[int, str], torch.Tensor]:
        """Those that have changed since the step began are buffers from now on; what they began with."""
        starts = self._parameters_at_start.items()
        params, known = self._all_parameters, self._changing
        return self._add([n for n, v in starts if n not in known and not torch.equal(params[n].detach().cpu(), v)])

    def _add(self, names: Sequence[str]) -> dict[tuple[int, str], torch.Tensor]:
        """Parameters of these names are buffers; what they began the step with, where that is known."""
        new = [name for name in names if name not in self._changing]
        if not new:
            return {}
        values = self._at_start.values
        self._changing |= {name: self._all_parameters[name] for name in new}
        self._at_start = Snapshot(self.tensors())
        of_parameters = len(self._dicts) - 1
        starts = {(of_parameters, n): v for n, v in self._parameters_at_start.items() if n in new}
        copy_fitting(self._at_start.values, {**values, **starts})
        return starts

    def put_back_if(self, bad: torch.Tensor) -> None:
        """The same where the scalar `bad` is not 0, without waiting for the device."""
        put_back_if(bad, self.tensors(), self._at_start.values)


def copy_fitting(to: Mapping[Any, torch.Tensor], values: Mapping[Any, torch.Tensor]) -> None:
    """Each of `to` becomes the value of its key, if there is one of its shape and dtype."""
    fitting = [key for key, tensor in to.items() if fits(tensor, values.get(key))]
    if fitting:
        torch._foreach_copy_([to[key] for key in fitting], [values[key] for key in fitting])


def fits(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and tensor.shape == other.shape and tensor.dtype is other.dtype


def is_writable(tensor: torch.Tensor) -> bool:
    """Whether values can be copied into it: not if it is sparse, or one number stands for several (`expand`)."""
    if tensor.layout is not torch.strided:
        return False
    strides = tensor.stride()
    return 0 not in strides or all(stride or size < 2 for size, stride in zip(tensor.shape, strides, strict=True))


class Snapshot:
    """Copies of tensors `of`, taken anew by `take`: small ones together, since a copy of each costs 2 us.

    values: by the keys of `of`, as they were taken last
    """

    def __init__(self, of: Mapping[Any, torch.Tensor]) -> None:
        self.of = of
        self.values: dict[Any, torch.Tensor] = {}
        self._together: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        small = {key: tensor for key, tensor in of.items() if tensor.is_contiguous()}
        for dtype in {tensor.dtype for tensor in small.values()}:
            parts = {key: tensor.view(-1) for key, tensor in small.items() if tensor.dtype is dtype}
            memory = torch.cat(list(parts.values()))
            views = memory.split([part.numel() for part in parts.values()])
            self.values |= {key: view.view(of[key].shape) for key, view in zip(parts, views, strict=True)}
            self._together.append((memory, list(parts.values())))
        self._alone = {key: tensor for key, tensor in of.items() if key not in small}
        self.values |= {key: tensor.clone() for key, tensor in self._alone.items()}

    @torch.no_grad()
    def take(self) -> None:
        for memory, parts in self._together:
            torch.cat(parts, out=memory)
        for key, tensor in self._alone.items():
            self.values[key].copy_(tensor)


def put_back_if(bad: torch.Tensor, tensors: Mapping[Any, torch.Tensor], before: Mapping[Any, torch.Tensor]) -> None:
    """Where the scalar `bad` is not 0, each of `tensors` becomes its value `before`; without waiting for the device."""
    fitting = [key for key, tensor in tensors.items() if fits(tensor, before.get(key))]
    for dtype in {tensors[key].dtype for key in fitting}:  # together: a launch for each would take longer than a step
        keys = [key for key in fitting if tensors[key].dtype is dtype]
        was, now = (torch.cat([side[key].reshape(-1) for key in keys]) for side in (before, tensors))
        parts = torch.where(bad > 0, was, now).split([tensors[key].numel() for key in keys])
        shaped = [part.view(tensors[key].shape) for key, part in zip(keys, parts, strict=True)]
        torch._foreach_copy_([tensors[key] for key in keys], shaped)
