"""Parts of the gradients travel while backward runs, and the weights are the same bits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optimization import OPTIMIZATION, settings
from processes import Pair
from torch import nn
from torch.utils.checkpoint import checkpoint

from raytrain.engine.engine import Engine
from raytrain.engine.layout import Layout
from raytrain.engine.overlap import segments_of
from raytrain.engine.world import World
from raytrain.errors import TaskError

# adam_onecycle: BatchNorm in a group of its own, at the end of the buffer
OPTIM = {**OPTIMIZATION, "OPTIMIZER": "adam_onecycle", "LR": 0.02}


class Net(nn.Module):
    """A shared layer, BatchNorm, f64, and branches that one rank, or nobody, takes in the last backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.twice = nn.Linear(8, 8)
        self.sometimes = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.precise = nn.Linear(8, 4).double()

    def forward(self, x: torch.Tensor, branch: bool) -> torch.Tensor:
        x = self.twice(self.twice(self.norm(self.first(x))).tanh())
        x = self.sometimes(x) if branch else x
        return self.precise(x.double()).square().mean().float()


def engine_of(rank: int, reduction: str, segment_bytes: int, **changes: Any) -> tuple[Net, Engine]:
    torch.manual_seed(0)
    model = Net()
    optim_cfg = SimpleNamespace(**{**OPTIM, **changes})
    return model, Engine(model, optim_cfg, World(rank, 2, 4), reduction, segment_bytes=segment_bytes)


def trained(rank: int, reduction: str, segment_bytes: int, engine_kind: str) -> dict[str, Any]:
    model, engine = engine_of(rank, reduction, segment_bytes, ENGINE=engine_kind)
    before_the_end: list[int] = []
    overlap = engine.gradients.overlap
    if overlap is not None:
        # The first layer's gradient is the last to come: what has started by then overlaps with backward.
        model.first.weight.register_hook(lambda grad: before_the_end.append(overlap._started))
    granted, losses = [], []
    for step in range(4):
        engine.zero_grad()
        for v in engine.world.block:
            with engine.virtual_worker():
                for i in range(2):
                    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * step + 10 * v + i))
                    loss = model(x, branch=(step + v + i) % 3 == 0)
                    engine.backward(loss, 1 / 8, is_last=(v, i) == (engine.world.block[-1], 1))
        stepped = engine.step(settings(0.01, 0.9, clip=0.5), (rank == 1 and step == 2, False))
        granted.append(stepped.wishes)
        losses.append(stepped.loss.item())
    return {
        "state": model.state_dict(),
        "optimizer": engine.optimizer_state()["state"],
        "wishes": granted,
        "loss": losses,
        "overlaps": overlap is not None,
        "segments": len(overlap._segments) if overlap else 0,
        "started": before_the_end,
    }


def assert_same_bits(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["flat", "ddp"])
@pytest.mark.parametrize("segment_bytes", [1, 600, 10**9])
def test_segments_that_travel_early_give_the_bits_of_one_sum_at_the_end(
    pair: Pair, kind: str, segment_bytes: int
) -> None:
    expected, _ = pair.run(trained, "shared_memory", segment_bytes, kind)
    first, second = pair.run(trained, "collective", segment_bytes, kind)
    assert not expected["overlaps"] and first["overlaps"] == (segment_bytes < 10**9)
    for found in (first, second):
        for what in ("state", "optimizer", "loss"):
            assert_same_bits(found[what], expected[what])
        assert found["wishes"] == expected["wishes"] == [(False, False)] * 2 + [(True, False), (False, False)]


def test_segments_are_under_way_before_backward_ends(pair: Pair) -> None:
    for found in pair.run(trained, "collective", 1, "flat"):
        assert found["segments"] == 13  # of 32 numbers
        # Nothing overtakes `never`, which has no gradient; `precise` alone lies before it.
        assert max(found["started"]) == 2


def reentrant(rank: int) -> str:
    model, engine = engine_of(rank, "collective", 1)
    engine.zero_grad()
    x = torch.ones(4, 8, requires_grad=True)
    for _ in range(2):
        x = checkpoint(model.twice, x, use_reentrant=True)
    try:
        engine.backward(x.sum(), 0.25, is_last=True)
    except TaskError as error:
        return str(error)
    return "no error"


def test_a_gradient_that_comes_in_parts_is_an_error_with_the_way_out(pair: Pair) -> None:
    for told in pair.run(reentrant):
        assert told.startswith("twice.") and told.endswith("use_reentrant=False gives it whole")


def test_segments_cover_all_parameters_and_are_as_large_for_each_process() -> None:
    layout = Layout([torch.zeros(100), torch.zeros(300), torch.zeros(7, dtype=torch.float64), torch.zeros(50)])
    segments = segments_of(layout, 1000, 48)
    assert [(s.dtype, s.start, s.stop, s.members) for s in segments] == [
        (torch.float32, 0, 288, [0, 1]),
        (torch.float32, 288, 576, [1, 3]),
        (torch.float64, 0, 144, [2]),
    ]
