"""The weights are the same bits on every number of processes: each virtual worker is a leaf of one tree."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optimization import optim_cfg, settings
from processes import Pair
from torch import nn
from torch.utils.checkpoint import checkpoint

from raytrain.engine.engine import Engine
from raytrain.engine.terms import Sum
from raytrain.engine.world import World
from raytrain.errors import TaskError

SIZES = (2, 3, 5)
VIRTUAL_WORKERS = 7  # 3 + 4, 3 + 2 + 2, 2 + 2 + 1 + 1 + 1


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Pair]]:
    with contextlib.ExitStack() as stack:
        meeting = tmp_path_factory.mktemp("worlds")
        yield {n: stack.enter_context(contextlib.closing(Pair(meeting / f"of {n}", n))) for n in SIZES}


class Net(nn.Module):
    """BatchNorm, an embedding with sparse gradients, parameters that some or none use, and f64."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 12, sparse=True)
        self.first = nn.Linear(12, 300)
        self.norm = nn.BatchNorm1d(300)
        self.sometimes = nn.Linear(300, 300)
        self.never = nn.Linear(3, 3)
        self.last = nn.Linear(300, 2)
        self.precise = nn.Linear(2, 2).double()

    def forward(self, ids: torch.Tensor, branch: bool) -> torch.Tensor:
        x = self.norm(self.first(self.words(ids))).relu()
        x = self.sometimes(x) if branch else x
        return self.precise(self.last(nn.functional.dropout(x, 0.3)).double()).square().mean().float()


VARIANTS: dict[str, dict[str, Any]] = {
    "flat": {},
    "ddp": {"ENGINE": "ddp"},
    "bf16": {"USE_AMP": True, "AMP_DTYPE": "bf16"},
    "fp16": {"USE_AMP": True, "LOSS_SCALE_FP16": 2.0**8},
    "weights": {"weighted": True},
    "mean of buffers": {"BUFFERS": "mean"},
    "mean of buffers, ddp": {"BUFFERS": "mean", "ENGINE": "ddp"},
    "one micro-batch": {"accumulate": 1},
    "one micro-batch, ddp": {"accumulate": 1, "ENGINE": "ddp"},
    "a bad step": {"bad": True},
    "a rollback": {"bad": True, "NONFINITE": "rollback", "ROLLBACK_EVERY": 2},
}


def trained(
    rank: int, size: int, reduction: str, segment_bytes: int, kind: str, is_exact: bool = True
) -> dict[str, Any]:
    """Four steps with dropout, two micro-batches each; which virtual worker takes the branch changes."""
    torch.set_num_threads(1)
    changes = dict(VARIANTS[kind])
    weighted, bad = changes.pop("weighted", False), changes.pop("bad", False)
    accumulate = changes.pop("accumulate", 2)
    torch.manual_seed(0)
    cfg = optim_cfg(OPTIMIZER="adam_onecycle", LR=0.02, **changes)
    world = World(rank, size, VIRTUAL_WORKERS)
    engine = Engine(Net(), cfg, world, reduction, is_exact, segment_bytes)
    told = []
    for step in range(4):
        engine.begin_step(step)
        terms: list[dict[tuple[str, str], Sum]] = []
        for v in world.block:
            with engine.virtual_worker(accumulate):
                for i in range(accumulate):
                    torch.manual_seed(1000 * step + 10 * v + i)
                    with engine.precision.autocast():
                        loss = engine.model(torch.randint(6, (4,)), branch=(step + v) % 3 == 0)
                    if bad and (step, v) == (2, 3):
                        loss = loss * torch.inf
                    share = torch.tensor(float(1 + v + i)) if weighted else 1 / (accumulate * VIRTUAL_WORKERS)
                    engine.backward(loss, share, is_last=(v, i) == (world.block[-1], accumulate - 1))
                terms.append({("tb_dict", "v"): Sum(0.1 * v, 1 / VIRTUAL_WORKERS)})
        stepped = engine.step(settings(0.01, 0.9, clip=0.5), (v == 6,), terms)
        means = {key: float(mean) for key, mean in (stepped.terms or {}).items()}
        told.append((stepped.loss.item(), stepped.grad_norm.item(), stepped.wishes, means))
    return {"model": engine.model.state_dict(), "moments": engine.optimizer_state()["state"], "told": told}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    for name, value in expected["model"].items():  # minus zero, and NaN by its bits
        assert found["model"][name].numpy().tobytes() == value.numpy().tobytes(), name
    for position, entry in expected["moments"].items():
        for name, value in entry.items():
            assert found["moments"][position][name].numpy().tobytes() == value.numpy().tobytes(), (position, name)


WAYS = {
    "shared memory": ("shared_memory", 10**9),
    "collectives": ("collective", 10**9),
    "segments": ("collective", 100_000),
}
CASES = [("shared memory", kind) for kind in VARIANTS]
CASES += [(way, kind) for way in ("collectives", "segments") for kind in ("flat", "ddp", "weights", "mean of buffers")]
CASES += [("collectives", "one micro-batch"), ("segments", "one micro-batch")]


@pytest.mark.parametrize(("way", "kind"), CASES)
def test_weights_and_moments_are_the_same_bits_on_any_number_of_processes(
    worlds: dict[int, Pair], way: str, kind: str
) -> None:
    expected = trained(0, 1, *WAYS[way], kind)
    for size, processes in worlds.items():
        for found in processes.run(trained, size, *WAYS[way], kind):
            assert_same(found, expected)


def test_where_exactness_is_given_up_they_are_not(worlds: dict[int, Pair]) -> None:
    """So that the tests above can fail; close they are all the same."""
    alone = trained(0, 1, *WAYS["segments"], "flat", is_exact=False)
    found = worlds[3].run(trained, 3, *WAYS["segments"], "flat", False)[0]
    assert found["told"] != alone["told"]
    assert found["told"][0][0] == pytest.approx(alone["told"][0][0], rel=1e-6)


class Checkpointed(nn.Module):
    """Gradients in parts, for every virtual worker or only for odd ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(40, 40)

    def forward(self, x: torch.Tensor, in_parts: bool) -> torch.Tensor:
        for _ in range(3 if in_parts else 1):
            x = checkpoint(self.layer, x, use_reentrant=True) if in_parts else self.layer(x)
        return x.square().mean()


def checkpointed(rank: int, size: int, sometimes: bool) -> list[torch.Tensor] | str:
    torch.manual_seed(0)
    engine = Engine(Checkpointed(), optim_cfg(OPTIMIZER="sgd", LR=0.1), World(rank, size, 4), "shared_memory")
    engine.begin_step(0)
    for v in engine.world.block:
        with engine.virtual_worker(1):
            x = torch.randn(8, 40, generator=torch.Generator().manual_seed(v)).requires_grad_()
            engine.backward(engine.model(x, not sometimes or v % 2 == 1), 0.25)
    engine.step(settings(0.1), ())
    return [p.detach() for p in engine.model.parameters()]


def test_gradients_that_come_in_parts_are_exact_too(worlds: dict[int, Pair]) -> None:
    expected = checkpointed(0, 1, False)
    for found in worlds[3].run(checkpointed, 3, False):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_gradients_that_come_in_parts_for_one_of_two_are_refused() -> None:
    with pytest.raises(TaskError, match="use_reentrant=False gives it whole"):
        checkpointed(0, 1, True)
