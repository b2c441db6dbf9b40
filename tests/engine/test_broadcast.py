"""Every process trains rank 0's model: what another one had built is named, or refused where it is another model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from raytrain.engine.broadcast import digest, take_from_rank_0, tensors_of
from raytrain.engine.world import World
from raytrain.errors import TaskError


def net(rank: int) -> nn.Module:
    """The same on each rank."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].weight.requires_grad_(False)
    model.register_buffer("queue", torch.zeros(2, 3, dtype=torch.bfloat16))
    model.register_buffer("scale", torch.ones(()), persistent=False)
    model.tied = model[0].weight
    return model


def changed(name: str, change: Callable[[torch.Tensor, int], object]) -> Callable[[int], nn.Module]:
    """`net`, with a change of the tensor of that name that depends on the rank."""

    def build(rank: int) -> nn.Module:
        model = net(rank)
        with torch.no_grad():
            change(tensors_of(model)[name], rank)
        return model

    return build


def with_modules(*names: str) -> Callable[[int], nn.Module]:
    """Modules of these names, in this order on rank 0 and in reverse on others."""
    return lambda rank: nn.ModuleDict({name: nn.Linear(2, 2) for name in (names if rank == 0 else names[::-1])})


def sized(on_first: int, elsewhere: int) -> Callable[[int], nn.Module]:
    return lambda rank: nn.Linear(3, elsewhere if rank else on_first)


def frozen(rank: int) -> nn.Module:
    model = net(rank)
    model[2].bias.requires_grad_(rank == 0)
    return model


def typed(rank: int) -> nn.Module:
    return net(rank).to(torch.float64 if rank else torch.float32)


def with_buffer(rank: int) -> nn.Module:
    model = net(rank)
    if rank:
        model.register_buffer("centres", torch.zeros(2))
    return model


def renamed(rank: int) -> nn.Module:
    return nn.ModuleDict({"head" if rank else "neck": nn.Linear(2, 2)})


DIFFERING = {
    "all drawn by the rank": (lambda rank: (torch.manual_seed(rank), nn.Linear(3, 2))[1], "weight, bias"),
    "a weight": (changed("2.weight", lambda tensor, rank: tensor.add_(rank)), "2.weight"),
    "one bit of it": (changed("2.weight", lambda tensor, rank: tensor[0, 0].mul_(1 + rank * 2**-23)), "2.weight"),
    "the sign of a zero": (changed("2.bias", lambda tensor, rank: tensor.fill_(-0.0 if rank else 0.0)), "2.bias"),
    "a frozen weight": (changed("1.weight", lambda tensor, rank: tensor.add_(rank)), "1.weight"),
    "a count": (changed("1.num_batches_tracked", lambda tensor, rank: tensor.fill_(rank)), "1.num_batches_tracked"),
    "a queue in bfloat16": (changed("queue", lambda tensor, rank: tensor.fill_(rank)), "queue"),
    "a buffer that is not saved": (changed("scale", lambda tensor, rank: tensor.fill_(rank)), "scale"),
    "a NaN": (changed("0.bias", lambda tensor, rank: tensor.fill_(float("nan") if rank else 0.0)), "0.bias"),
}
OTHERS = {
    "another size": (sized(2, 5), "weight is (5, 3) float32, trained (rank 0: (2, 3) float32, trained)"),
    "a name that is missing": (renamed, "neck.weight is only on rank 0; neck.bias is only on rank 0"),
    "a buffer more": (with_buffer, "centres is not on rank 0"),
    "another order": (with_modules("owl", "cat"), "cat.weight comes where rank 0 has owl.weight"),
    "a frozen parameter": (frozen, "2.bias is (2,) float32, frozen (rank 0: (2,) float32, trained)"),
    "another type": (typed, "tied is (4, 3) float64, trained (rank 0: (4, 3) float32, trained)"),
}


def taken(rank: int, case: str) -> tuple[list[str], dict[str, int]]:
    """What is told, and the model after it."""
    build = DIFFERING[case][0] if case in DIFFERING else net
    model = build(rank)
    notes = take_from_rank_0(model, World(rank, 2, 2))
    return notes, {name: digest(tensor) for name, tensor in tensors_of(model).items()}


def refused(rank: int, case: str) -> str:
    with pytest.raises(TaskError) as error:
        take_from_rank_0(OTHERS[case][0](rank), World(rank, 2, 2))
    return str(error.value)


@pytest.mark.parametrize("case", DIFFERING)
def test_values_of_another_rank_are_named_and_give_way_to_rank_0s(case, pair):
    (notes, first), (also, second) = pair.run(taken, case)
    assert notes == also and first == second
    assert first == {name: digest(tensor) for name, tensor in tensors_of(DIFFERING[case][0](0)).items()}
    assert len(notes) == 1 and "\n" not in notes[0]
    assert f"on rank 1 than on rank 0, whose are taken: {DIFFERING[case][1]}. Likely" in notes[0]


def test_of_what_is_the_same_nothing_is_told(pair):
    (notes, first), (also, second) = pair.run(taken, "the same")
    assert notes == also == [] and first == second


@pytest.mark.parametrize("case", OTHERS)
def test_another_model_on_another_rank_is_refused_on_both(case, pair):
    errors = pair.run(refused, case)
    assert errors[0] == errors[1] and f"another model on rank 1 than on rank 0: {OTHERS[case][1]}" in errors[0]
