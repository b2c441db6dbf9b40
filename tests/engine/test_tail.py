"""What rides behind the gradients: as it was written, summed over the processes, late where asking would wait."""

from __future__ import annotations

import pytest
import torch
from processes import Pair
from torch import nn

from raytrain.engine.gradients import open_reduction
from raytrain.engine.late import LATE_STEPS
from raytrain.engine.reduction import Reduction
from raytrain.engine.tail import Combined, LeafLoss, Tail, with_tail
from raytrain.engine.terms import MAX_TERMS
from raytrain.engine.tree import additions
from raytrain.engine.world import World

PARAMS = [nn.Parameter(torch.zeros(2)) for _ in range(3)]


def ridden(rank: int, size: int, dtype: torch.dtype) -> list[Combined]:
    """What two steps read; virtual workers use a parameter each, and the last one has a wish in the second step."""
    adds, world = additions(rank, size, size), World(rank, size, size)
    reduction = open_reduction(with_tail({dtype: 8}, len(PARAMS)), {}, world, "auto", adds, is_exact=True)
    tail, combined = Tail(PARAMS, reduction, adds.here), []
    for step in range(2):
        reduction.open()
        tail.write(
            [i == rank for i in range(3)], (False, step == 1 and rank == size - 1), [LeafLoss(torch.tensor(0.5 + rank))]
        )
        reduction.reduce({})
        combined.append(tail.read(2))
    return combined


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_one_process_used_wished_or_lost_all_know_after_the_reduction(pair: Pair, dtype: torch.dtype) -> None:
    for combined in pair.run(ridden, 2, dtype):
        assert [each.used for each in combined] == [[True, True, False]] * 2
        assert [each.wishes for each in combined] == [(False, False), (False, True)]
        assert [each.loss.item() for each in combined] == [2.0, 2.0]
        assert combined[0].loss.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


def test_a_tail_is_behind_the_gradients_and_leaves_them_alone() -> None:
    reduction = Reduction(with_tail({torch.float32: 8}, len(PARAMS)), World())
    reduction.nodes[0][torch.float32][:8] = 7.0
    tail = Tail(PARAMS, reduction, additions(0, 1, 1).here)
    tail.write([True] * 3, (True,), [LeafLoss(torch.tensor(3.0), torch.tensor(5.0))])
    flags = [1.0, 1.0, 1.0, *[1.0, 0.0, 0.0, 0.0]]
    assert reduction.nodes[0][torch.float32].tolist() == [7.0] * 8 + flags + [3.0, 5.0] + [0.0] * 2 * MAX_TERMS
    assert tail.read(1) == ([True] * 3, (True,), torch.tensor(3.0), torch.tensor(5.0), None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_wishes_are_those_of_two_steps_ago() -> None:
    reduction = Reduction(with_tail({torch.float32: 8}, 3), World(device=torch.device("cuda")))
    tail, wishes = Tail(PARAMS, reduction, additions(0, 1, 1).here), []
    for step in range(4):
        tail.write([True] * 3, (step == 1,), [LeafLoss(torch.tensor(1.0, device="cuda"))])
        wishes.append(tail.read(1).wishes)
    assert wishes == [(step == 1 + LATE_STEPS,) for step in range(4)]
