"""One optimizer step from the losses of all virtual workers: the same numbers on one process and on two."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optimization import OPTIMIZATION, settings
from processes import Pair
from torch import nn

from raytrain.engine.engine import Engine, Stepped
from raytrain.engine.optim import clip_gradients
from raytrain.engine.world import World
from raytrain.keeper.heartbeat import PHASES

OPTIM = {**OPTIMIZATION, "OPTIMIZER": "sgd", "LR": 0.1}
VIRTUAL_WORKERS, ACCUMULATE, BATCH = 4, 2, 3


class Mixed(nn.Module):
    """f32, f64 and bf16 parameters; some that no or not every virtual worker uses; buffers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 3)
        self.precise = nn.Parameter(torch.linspace(0, 1, 3, dtype=torch.float64))
        self.coarse = nn.Parameter(torch.full((3,), 0.5, dtype=torch.bfloat16))
        self.unused = nn.Parameter(torch.ones(2))
        self.rarely = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("empty", torch.zeros(0))

    def forward(self, x: torch.Tensor, v: int) -> torch.Tensor:
        if self.training:
            self.seen |= True
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)  # reassigned, not changed in place
        y = self.linear(self.norm(x)) * self.precise.float() * self.frozen
        y = y + self.rarely if v == 1 else y
        return (y.square().mean() + 0.25 * self.coarse.sum()) * (v + 1)  # coarse: gradients that bf16 adds exactly


def inputs(step: int, v: int, i: int) -> torch.Tensor:
    return torch.randn(BATCH, 4, generator=torch.Generator().manual_seed(100 * step + 10 * v + i))


def engine_of(model: nn.Module, world: World | None = None, reduction: str = "auto", **changes: Any) -> Engine:
    return Engine(model, SimpleNamespace(**{**OPTIM, **changes}), world or World(), reduction)


def model_and_engine(world: World, **changes: Any) -> tuple[nn.Module, Engine]:
    torch.manual_seed(0)
    model = Mixed()
    return model, engine_of(model, world, **changes)


def one_step(
    model: nn.Module, engine: Engine, step: int, wishes: tuple[bool, ...] = (), clip: float | None = None
) -> Stepped:
    """What loop.train_step does, with the loss of each micro-batch weighted by its virtual worker."""
    engine.zero_grad()
    for v in engine.world.block:
        with engine.virtual_worker():
            for i in range(ACCUMULATE):
                loss = model(inputs(step, v, i), v)
                engine.backward(loss, 1.0 / (ACCUMULATE * engine.world.virtual_workers))
    return engine.step(settings(clip=clip, weight_decay=0.1), wishes)


def after_steps(rank: int, size: int, clip: float | None = None) -> dict[str, Any]:
    world = World(rank, size, VIRTUAL_WORKERS)
    model, engine = model_and_engine(world)
    stepped = [one_step(model, engine, step, clip=clip) for step in range(3)]
    return {
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "state": model.state_dict(),
        "optimizer": engine.optimizer_state()["state"],
        "loss": [s.loss.item() for s in stepped],
        "norm": [s.grad_norm.item() for s in stepped],
    }


def tolerance(value: torch.Tensor) -> dict[str, float]:
    """Rounding: of bf16 for what is bf16, else of the f32 that is computed in."""
    allowed = 1e-2 if value.dtype == torch.bfloat16 else 2e-6
    return {"rtol": allowed, "atol": allowed}


@pytest.mark.parametrize("clip", [None, 0.5])
def test_virtual_workers_on_one_process_step_to_the_bits_that_they_do_on_two(pair: Pair, clip: float | None) -> None:
    alone = after_steps(0, 1, clip)
    for found in pair.run(after_steps, 2, clip):
        assert [n for n, grad in found["grads"].items() if grad is None] == ["unused", "frozen"]
        torch.testing.assert_close(found, alone, rtol=0, atol=0)


def test_the_gradient_is_the_mean_over_all_micro_batches() -> None:
    model, engine = model_and_engine(World(virtual_workers=VIRTUAL_WORKERS))
    plain = copy.deepcopy(model)
    stepped = one_step(model, engine, 0)
    losses = [plain(inputs(0, v, i), v) for v in range(VIRTUAL_WORKERS) for i in range(ACCUMULATE)]
    loss = torch.stack(losses).mean()
    loss.backward()
    assert stepped.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, **tolerance(p))


def test_a_parameter_that_nobody_uses_keeps_no_gradient_and_is_not_decayed(pair: Pair) -> None:
    for found in (after_steps(0, 1), *pair.run(after_steps, 2)):
        assert found["grads"]["unused"] is None and found["grads"]["frozen"] is None
        assert torch.equal(found["state"]["unused"], torch.ones(2))
        assert found["grads"]["rarely"].abs().sum() > 0  # one virtual worker's use is enough, on every process


def test_buffers_are_virtual_worker_0s_as_ddp_broadcasts_rank_0s(pair: Pair) -> None:
    expected = Mixed()
    for step in range(3):
        for i in range(ACCUMULATE):
            expected(inputs(step, 0, i), 0)
    for found in (after_steps(0, 1), *pair.run(after_steps, 2)):
        for name, buffer in expected.named_buffers():
            torch.testing.assert_close(found["state"][name], buffer, rtol=1e-6, atol=1e-6, msg=name)
        assert found["state"]["norm.num_batches_tracked"] == 3 * ACCUMULATE


def test_each_virtual_worker_starts_from_the_buffers_that_the_step_began_with() -> None:
    model, engine = model_and_engine(World(virtual_workers=3))
    seen = []
    engine.zero_grad()
    for v in engine.world.block:
        with engine.virtual_worker():
            seen.append((model.norm.running_mean.clone(), model.mean.clone()))
            model(inputs(0, v, 0), v)
    for running_mean, mean in seen:
        assert torch.equal(running_mean, torch.zeros(4)) and torch.equal(mean, torch.zeros(4))


def test_buffers_are_restored_when_a_virtual_worker_fails() -> None:
    model, engine = model_and_engine(World(virtual_workers=2))
    engine.zero_grad()
    with engine.virtual_worker():
        model(inputs(0, 0, 0), 0)
    before = {name: b.clone() for name, b in model.named_buffers()}
    with pytest.raises(ZeroDivisionError), engine.virtual_worker():
        model(inputs(0, 1, 0), 1)
        raise ZeroDivisionError
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_accumulation_equals_one_large_batch() -> None:
    """Without BatchNorm, in f64."""

    def trained(batches: list[torch.Tensor]) -> torch.Tensor:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        engine = engine_of(model)
        for _ in range(4):
            engine.zero_grad()
            with engine.virtual_worker():
                for x in batches:
                    engine.backward(model(x).square().mean(), 1.0 / len(batches))
            engine.step(settings(0.01, clip=0.1, weight_decay=0.1), ())
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(trained(list(x.split(3))), trained([x]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["flat", "ddp"])
def test_the_norm_is_of_what_is_stepped_before_it_is_clipped(kind: str) -> None:
    """A parameter that no group holds (LEGACY_PARAM_GROUPS) neither counts nor keeps an old gradient."""
    model, engine = model_and_engine(World(), OPTIMIZER="adam_onecycle", LEGACY_PARAM_GROUPS=True, ENGINE=kind)
    norms, left_out = [], []
    for step in range(2):
        x = inputs(step, 0, 0)
        plain = copy.deepcopy(model)
        plain(x, 0).backward()
        stepped = {"linear.weight", "linear.bias", "norm.weight", "norm.bias"}
        expected = clip_gradients([p for n, p in plain.named_parameters() if n in stepped], None)
        engine.zero_grad()
        with engine.virtual_worker():
            engine.backward(model(x, 0), 1.0)
        found = engine.step(settings(clip=1e-3, weight_decay=0.0), ())
        norms.append((found.grad_norm.item(), expected.item()))
        left_out.append((model.precise.grad, plain.precise.grad))
        if kind == "ddp":  # flat clips inside the kernel; tests/engine/test_flat.py looks at the weights
            clipped = clip_gradients([p for n, p in model.named_parameters() if n in stepped], None)
            assert clipped.item() == pytest.approx(1e-3, rel=1e-2)
    for found_norm, expected_norm in norms:
        assert found_norm == pytest.approx(expected_norm, rel=1e-5)
    for grad, fresh in left_out:
        torch.testing.assert_close(grad, fresh)


def wishes_granted(rank: int) -> list[tuple[bool, ...]]:
    model, engine = model_and_engine(World(rank, 2, 2))
    asked = [[(False, False), (False, True), (True, True)], [(False, False), (True, False), (False, False)]][rank]
    return [one_step(model, engine, step, wishes).wishes for step, wishes in enumerate(asked)]


def test_what_one_rank_wishes_every_rank_is_granted_in_the_same_step(pair: Pair) -> None:
    assert pair.run(wishes_granted) == [[(False, False), (True, True), (True, True)]] * 2


def all_of_one_type(rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, float, tuple[bool, ...]]:
    """A model without any f32: the wishes and the loss travel by themselves."""
    model = nn.Linear(3, 1).to(dtype)
    nn.init.constant_(model.weight, 0.5), nn.init.constant_(model.bias, 0.0)
    engine = engine_of(model, World(rank, 2, 2), MOMENTUM=0.0)
    engine.zero_grad()
    with engine.virtual_worker():
        engine.backward(model(torch.full((1, 3), 1.0 + rank, dtype=dtype)).sum(), 0.5)
    stepped = engine.step(settings(0.5, weight_decay=0.0), (rank == 1,))
    return model.weight.detach(), stepped.loss.item(), stepped.wishes


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_without_any_f32_parameter_train_too(pair: Pair, dtype: torch.dtype) -> None:
    for weight, loss, wishes in pair.run(all_of_one_type, dtype):
        assert weight.tolist() == [[-0.25] * 3]  # 0.5 - 0.5 * mean of 1 and 2
        assert loss == 2.25 and wishes == (True,)


def test_a_loss_in_f64_is_told_in_f64() -> None:
    model = nn.Linear(1, 1).double()
    engine = engine_of(model)
    engine.zero_grad()
    loss = model(torch.ones(1, 1, dtype=torch.float64)).sum()
    with engine.virtual_worker():
        engine.backward(loss, 1.0)
    assert engine.step(settings(0.0), ()).loss.item() == loss.item()


def test_each_backward_pass_and_the_reduction_beat_before_they_begin() -> None:
    model, engine = model_and_engine(World(virtual_workers=VIRTUAL_WORKERS))
    beats: list[str] = []
    engine.beat = beats.append
    one_step(model, engine, 0)
    assert beats == ["backward"] * VIRTUAL_WORKERS * ACCUMULATE + ["reduce"]
    assert set(beats) <= set(PHASES)
