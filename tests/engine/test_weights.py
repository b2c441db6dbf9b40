"""Micro-batches count by their weights: the step is that of one batch of all, however it is cut and dealt."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optimization import OPTIMIZATION, settings
from processes import Pair
from torch import nn

from raytrain.engine.engine import Engine, Stepped
from raytrain.engine.world import World
from raytrain.errors import TaskError

OPTIM = {**OPTIMIZATION, "OPTIMIZER": "sgd", "LR": 0.1, "MOMENTUM": 0.0}
# Things of each micro-batch of each of four virtual workers. The loss is a mean over things.
COUNTS = {
    "equal": [[2, 2], [2, 2], [2, 2], [2, 2]],
    "a short last one": [[3, 1], [3, 1], [3, 1], [3, 1]],
    "another number on each": [[1, 2], [7, 3], [4, 4], [5, 1]],
    "nothing in one": [[4, 0], [1, 2], [3, 3], [2, 1]],
    "nothing on one": [[4, 1], [0, 0], [3, 3], [2, 1]],
    "nothing but one": [[0, 0], [0, 0], [0, 6], [0, 0]],
    "one micro-batch each": [[9], [1], [2], [5]],
}
ENGINES = {
    "flat": {},
    "ddp": {"ENGINE": "ddp"},
    "fp16": {"USE_AMP": True, "LOSS_SCALE_FP16": 1024.0},
    "clipped": {},
}


class Net(nn.Module):
    """In f32 and f64. x: (N, 4).   Returns the mean over N, NaN if there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.fine = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x).float().tanh() * self.fine).square().sum(1).mean().float()


def things(v: int, i: int, count: int) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(10 * v + i))


def engine_of(world: World, reduction: str = "auto", segment_bytes: int = 10**9, **changes: Any) -> Engine:
    torch.manual_seed(0)
    return Engine(Net(), SimpleNamespace(**{**OPTIM, **changes}), world, reduction, segment_bytes=segment_bytes)


def take(engine: Engine, counts: list[list[int]], clip: float | None = None, scale: float = 1.0) -> Stepped:
    """A step of the micro-batches of this process, each with its number of things as weight, times `scale`."""
    engine.zero_grad()
    block = engine.world.block
    for v in block:
        with engine.virtual_worker():
            for i, count in enumerate(counts[v]):
                is_last = (v, i) == (block[-1], len(counts[v]) - 1)
                loss = engine.model(things(v, i, count))
                engine.backward(loss, torch.tensor(scale * count), is_last)
    return engine.step(settings(0.5, clip=clip), ())


def of_one_batch(counts: list[list[int]], clip: float | None, **changes: Any) -> tuple[list[torch.Tensor], Stepped]:
    engine = engine_of(World(), **changes)
    engine.zero_grad()
    batch = torch.cat([things(v, i, count) for v, each in enumerate(counts) for i, count in enumerate(each)])
    with engine.virtual_worker():
        engine.backward(engine.model(batch), 1.0)
    return weights_of(engine), engine.step(settings(0.5, clip=clip), ())


def weights_of(engine: Engine) -> list[torch.Tensor]:
    return [p.detach() for p in engine.model.parameters()]


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_weighted_micro_batches_step_as_one_batch_of_all(counts: list[list[int]], kind: str) -> None:
    clip = 0.01 if kind == "clipped" else None
    expected, stepped = of_one_batch(counts, clip, **ENGINES[kind])
    engine = engine_of(World(virtual_workers=4), **ENGINES[kind])
    found = take(engine, counts, clip)
    torch.testing.assert_close(weights_of(engine), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.loss.float(), stepped.loss.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.grad_norm, stepped.grad_norm, rtol=1e-5, atol=1e-6)
    assert found.bad_step is None


def stepped_on(
    rank: int, counts: list[list[int]], reduction: str, segment_bytes: int, kind: str
) -> tuple[list[torch.Tensor], float, float]:
    engine = engine_of(World(rank, 2, 4), reduction, segment_bytes, **ENGINES[kind])
    stepped = take(engine, counts)
    return weights_of(engine), stepped.loss.item(), stepped.grad_norm.item()


@pytest.mark.parametrize("kind", ["flat", "ddp", "fp16"])
@pytest.mark.parametrize(
    ("reduction", "segment_bytes"), [("shared_memory", 10**9), ("collective", 10**9), ("collective", 1)]
)
def test_processes_with_unequal_weights_step_as_one_batch_of_all(
    pair: Pair, reduction: str, segment_bytes: int, kind: str
) -> None:
    for counts in (COUNTS["another number on each"], COUNTS["nothing on one"]):
        weights, stepped = of_one_batch(counts, None, **ENGINES[kind])
        first, second = pair.run(stepped_on, counts, reduction, segment_bytes, kind)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        expected = (weights, stepped.loss.item(), stepped.grad_norm.item())
        torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-6)


def test_weights_count_by_their_ratio() -> None:
    engines = [engine_of(World(virtual_workers=4)) for _ in range(2)]
    for engine, scale in zip(engines, (1.0, 1 / 1024), strict=True):
        take(engine, COUNTS["another number on each"], scale=scale)
    torch.testing.assert_close(*map(weights_of, engines), rtol=0, atol=0)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["flat", "ddp", "fp16"])
def test_a_step_in_which_nothing_counts_changes_nothing_and_is_told(kind: str, late: bool) -> None:
    engine = engine_of(World(virtual_workers=4), **ENGINES[kind])
    engine.reads_late = late
    take(engine, COUNTS["equal"])
    before = {name: tensor.clone() for name, tensor in engine.live_tensors().items()}
    told = [take(engine, [[0, 0]] * 4).bad_step for _ in range(3)]
    bad_step = told[2 if late else 0]
    assert bad_step is not None and bad_step.kind == "nonfinite"
    assert math.isnan(bad_step.loss) and bad_step.loss_here == 0.0
    for name, tensor in engine.live_tensors().items():
        assert torch.equal(tensor, before[name]), name
    other = engine_of(World(virtual_workers=4), **ENGINES[kind])
    for each in (other, other, engine):
        take(each, COUNTS["equal"])
    torch.testing.assert_close(weights_of(engine), weights_of(other), rtol=0, atol=0)


def mixed(rank: int, kinds: str) -> str:
    """Each letter of a rank's kinds is a micro-batch: with a weight (w), or without (-)."""
    mine = kinds.split()[rank]
    engine = engine_of(World(rank, 2, 2))
    engine.zero_grad()
    try:
        for each in mine:
            share = torch.tensor(2.0) if each == "w" else 0.25
            engine.backward(engine.model(things(0, 0, 2)), share)
        engine.step(settings(0.5), ())
    except TaskError as error:
        return str(error)
    return "stepped"


def test_weights_for_some_and_not_for_others_are_refused_on_one_rank_or_across_them(pair: Pair) -> None:
    assert pair.run(mixed, "ww ww") == pair.run(mixed, "-- --") == ["stepped"] * 2
    for told in pair.run(mixed, "ww --"):
        assert told.startswith("model_func gave ModelReturn a weight for some micro-batches and none for others")
    for kinds in ("w- w-", "-w -w"):
        assert all("weight for some" in told for told in pair.run(mixed, kinds))


@pytest.mark.parametrize(("size", "accumulate", "workers"), [(1, 3, 1), (3, 3, 7), (5, 6, 3), (16, 10, 48), (7, 1, 1)])
def test_shares_of_equal_micro_batches_are_to_the_bit_what_they_were(size: int, accumulate: int, workers: int) -> None:
    assert size / (size * accumulate * workers) == 1.0 / (accumulate * workers)
