"""Buffers over a step: caches that grow, and values put back without asking the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optimization import optim_cfg, settings
from processes import Pair
from tasks_with_state import Teacher
from torch import nn

from raytrain.engine.buffers import ModuleBuffers, put_back_if
from raytrain.engine.engine import Engine
from raytrain.engine.modes import TrainingMode
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


# Parameters that forward changes


def with_teacher(
    rank: int, size: int, how: str, reduction: str, bad_step: int | None = None
) -> tuple[dict[str, torch.Tensor], list[str], torch.Tensor]:
    """State after three steps; what was found to be changed by forward; the momentum copy's bias as it should be."""
    torch.manual_seed(0)
    model = Teacher(how)
    cfg = optim_cfg(OPTIMIZER="sgd", LR=0.1)
    engine = Engine(model, cfg, World(rank, size, 2), reduction)
    mode, bias = TrainingMode(model), model.slow[0].bias.clone()
    for step in range(3):
        mode.begin()
        if step != bad_step:
            bias = bias * 0.9 + model.student[0].bias.detach() * 0.1
        engine.zero_grad()
        for v in engine.world.block:
            with engine.virtual_worker():
                torch.manual_seed(10 * step + v)
                got, wanted = model(torch.randn(4, 5))
                loss = (got - wanted).square().mean() * (math.nan if (step, v) == (bad_step, 1) else 1)
                engine.backward(loss, 0.5)
        engine.step(settings(weight_decay=0.1), ())
    return {name: value.clone() for name, value in model.state_dict().items()}, engine.newly_followed, bias


@pytest.mark.parametrize("reduction", ["shared_memory", "collective"])
@pytest.mark.parametrize("how", ["data", "assigned", "in place"])
def test_parameters_that_forward_changes_are_virtual_worker_0s(how: str, reduction: str, pair: Pair) -> None:
    alone, found, bias = with_teacher(0, 1, how, reduction)
    assert [name for name in found if not name.startswith("slow.")] == ["queue"] and len(found) == 7
    torch.testing.assert_close(alone["slow.0.bias"], bias)  # moved once a step, though two virtual workers run forward
    (first, names, _), (second, _, _) = pair.run(with_teacher, 2, how, reduction)
    assert names == found
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("bad_step", [0, 1])
def test_a_bad_step_leaves_them_as_they_were(bad_step: int) -> None:
    state, _, bias = with_teacher(0, 1, "assigned", "auto", bad_step)
    torch.testing.assert_close(state["slow.0.bias"], bias)
    assert (state["queue"].abs().sum(1) > 0).sum() == 4  # two rows for each good step


def test_what_a_rehearsal_does_to_them_is_undone() -> None:
    model = Teacher("assigned")
    buffers = ModuleBuffers(model)
    before = {name: param.clone() for name, param in model.named_parameters()}
    memory = model.queue.data_ptr()
    for names in ([], ["queue", *(f"slow.{name}" for name, _ in model.slow.named_parameters())]):
        buffers.follow(names, looks_left=0 if names else 1)
        with buffers.parameters_kept():
            model(torch.randn(4, 5))
            assert not torch.equal(model.queue, before["queue"])
        assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
        assert model.queue.data_ptr() == memory


def test_a_trained_embedding_that_forward_renorms_is_the_same_for_one_process_and_for_two(pair: Pair) -> None:
    alone, found = with_renorm(0, 1)
    assert found == ["0.weight"]
    for state, names in pair.run(with_renorm, 2):
        assert names == found
        torch.testing.assert_close(state, alone, rtol=1e-6, atol=1e-6)


def with_renorm(rank: int, size: int) -> tuple[torch.Tensor, list[str]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 3, max_norm=0.5), nn.Linear(3, 1))
    cfg = optim_cfg(OPTIMIZER="sgd", LR=0.1)
    engine = Engine(model, cfg, World(rank, size, 2))
    for step in range(3):
        engine.zero_grad()
        for v in engine.world.block:
            with engine.virtual_worker():
                engine.backward(model(torch.tensor([step, 3 + v])).square().mean(), 0.5)
        engine.step(settings(weight_decay=0.1), ())
    return model[0].weight.detach().clone(), engine.newly_followed
