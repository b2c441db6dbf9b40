"""Buffers over a step: caches that grow, and values put back without asking the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optimization import optim_cfg, settings
from processes import Pair
from torch import nn

from raytrain.engine.buffers import ModuleBuffers, put_back_if
from raytrain.engine.engine import Engine
from raytrain.engine.world import World


def inputs(step: int, v: int) -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(100 * step + 10 * v))


class Caches(nn.Module):
    """BatchNorm, a cache as long as the longest sequence so far, statistics that the first batch makes, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("positions", torch.zeros(2), persistent=False)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("one", torch.ones(1).expand(3))

    def forward(self, x: torch.Tensor, length: int) -> torch.Tensor:
        if length > len(self.positions):
            self.positions = torch.arange(float(length))
        if not hasattr(self, "first"):
            self.register_buffer("first", x.detach().mean(0))
        return (self.linear(self.norm(x - self.first)) * self.one).square().mean()


def with_caches(rank: int, size: int, reduction: str) -> dict[str, torch.Tensor]:
    """What the buffers are after three steps; virtual worker 0 sees the longer sequences."""
    torch.manual_seed(0)
    model = Caches()
    cfg = optim_cfg(OPTIMIZER="sgd", LR=0.1)
    engine = Engine(model, cfg, World(rank, size, 2), reduction)
    for step in range(3):
        engine.zero_grad()
        for v in engine.world.block:
            with engine.virtual_worker():
                engine.backward(model(inputs(step, v), 5 + step - 3 * v), 0.5)
                assert len(model.positions) >= 5 + step - 3 * v
        engine.step(settings(weight_decay=0.1), ())
    return {name: b.clone() for name, b in model.named_buffers()}


@pytest.mark.parametrize("reduction", ["shared_memory", "collective"])
def test_caches_that_grow_and_buffers_that_come_late_spoil_no_statistics(pair: Pair, reduction: str) -> None:
    alone = with_caches(0, 1, reduction)
    assert len(alone["positions"]) == 7
    for rank, found in enumerate(pair.run(with_caches, 2, reduction)):
        assert torch.equal(found.pop("positions"), torch.arange(7.0 if rank == 0 else 4.0))
        for name, buffer in found.items():
            torch.testing.assert_close(buffer, alone[name], rtol=1e-6, atol=1e-6, msg=name)


def test_they_are_looked_up_anew_only_when_a_module_has_put_another_in_place() -> None:
    model = Caches()
    buffers = ModuleBuffers(model)
    before = buffers.tensors()
    assert {name for _, name in before} == {"positions", "running_mean", "running_var", "num_batches_tracked"}
    model.norm.running_mean += 1.0
    assert buffers.tensors() is before
    model.positions = torch.zeros(5)
    (after,) = [buffer for (_, name), buffer in buffers.tensors().items() if name == "positions"]
    assert len(after) == 5


def test_values_are_put_back_without_asking_what_the_verdict_is() -> None:
    shapes: list[tuple[Any, torch.dtype]] = [
        ((), torch.int64),
        ((2, 3), torch.float32),
        (4, torch.bool),
        (5, torch.float32),
    ]
    before = {i: torch.ones(shape, dtype=dtype) for i, (shape, dtype) in enumerate(shapes)}
    for bad in (0.0, 1.0):
        now = {i: torch.zeros_like(tensor) for i, tensor in before.items()} | {9: torch.zeros(7)}
        now[1] = torch.full((2, 3), math.nan)
        put_back_if(torch.tensor(bad), now, {**before, 3: torch.ones(6)})
        assert (now[0].item(), now[2].all().item(), now[1].isnan().any().item()) == (bad, bool(bad), not bad)
        assert not now[3].any() and not now[9].any()  # what has no earlier value of its shape stays
