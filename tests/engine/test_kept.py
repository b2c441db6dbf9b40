"""Whatever is done to a model in a block: afterwards it is what it was, and what had changed is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from raytrain.engine.kept import model_kept, tensors_of


def net() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    model.register_buffer("unknown", torch.tensor([torch.nan, 1.0]))
    model.register_buffer("wide", torch.zeros(1).expand(3), persistent=False)
    model[2].tied = model[0].weight
    return model


@torch.no_grad()
def in_place(model: nn.Sequential) -> None:
    model[2].bias.add_(1)


def by_data(model: nn.Sequential) -> None:
    model[0].weight.data = torch.zeros(4, 3)


def loaded(model: nn.Sequential) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def in_training_mode(model: nn.Sequential) -> None:
    model.train()
    model(torch.ones(2, 3))


def another_buffer(model: nn.Sequential) -> None:
    model.cache = torch.ones(2)


def grown(model: nn.Sequential) -> None:
    model.cache = torch.ones(5)


def read(model: nn.Sequential) -> None:
    model.eval()
    model(torch.ones(2, 3))


STATISTICS = ["1.running_mean", "1.running_var", "1.num_batches_tracked"]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (in_place, ["2.bias"]),
        (by_data, ["0.weight"]),
        (loaded, ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "unknown", *STATISTICS]),
        (in_training_mode, STATISTICS),
        (another_buffer, ["cache"]),
        (grown, []),
        (read, []),
    ],
)
def test_a_model_is_what_it_was(change: Callable[[nn.Sequential], None], names: list[str]) -> None:
    model, expected = net(), net()
    places = {name: param.data_ptr() for name, param in model.named_parameters()}
    with model_kept(model) as changed:
        change(model)
    assert changed == names
    assert {name: param.data_ptr() for name, param in model.named_parameters()} == places
    for name, tensor in tensors_of(model).items():
        if (change, name) != (grown, "cache"):
            torch.testing.assert_close(tensor, tensors_of(expected)[name], rtol=0, atol=0, equal_nan=True)


def test_also_where_the_block_fails() -> None:
    model = net()
    with pytest.raises(ValueError, match="bad"), model_kept(model):
        in_place(model)
        raise ValueError("bad")
    assert torch.equal(model[2].bias, net()[2].bias)
