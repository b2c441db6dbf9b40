"""Weights of other programs: taken from whatever they are wrapped in; what was taken, left and renamed is told."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raytrain.engine.pretrained import Pretrained, load_pretrained
from raytrain.errors import CheckpointError


def net(classes: int = 3) -> nn.Module:
    torch.manual_seed(classes)
    body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    return nn.ModuleDict({"body": body, "head": nn.Linear(8, classes)})


SOURCE = net(5).state_dict()
BODY = [name for name in SOURCE if name.startswith("body.")]


def prefixed(prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in SOURCE.items()}


FILES: dict[str, tuple[Any, str]] = {
    "bare": (SOURCE, ""),
    "an OrderedDict with metadata": (OrderedDict(SOURCE), ""),
    "model_state": ({"model_state": SOURCE, "epoch": 3}, "under 'model_state'"),
    "state_dict": ({"state_dict": SOURCE, "optimizer": {}}, "under 'state_dict'"),
    "model": ({"model": SOURCE, "args": {"lr": 0.1}}, "under 'model'"),
    "model_state_dict": ({"model_state_dict": SOURCE, "loss": 0.5}, "under 'model_state_dict'"),
    "DDP": (prefixed("module."), "without 'module.'"),
    "DDP in state_dict": ({"state_dict": prefixed("module.")}, "under 'state_dict', without 'module.'"),
    "Lightning": ({"state_dict": prefixed("model."), "pytorch-lightning_version": "2"}, "without 'model.'"),
    "compiled": ({"model_state": prefixed("_orig_mod.")}, "without '_orig_mod.'"),
    "compiled in DDP": (prefixed("module._orig_mod."), "without 'module.', without '_orig_mod.'"),
    "compiled within": ({name.replace("body.", "body._orig_mod."): v for name, v in SOURCE.items()}, "'_orig_mod.'"),
    "one prefix more": (prefixed("detector."), "without 'detector.'"),
    "a prefix of two names": (prefixed("student.net."), "without 'student.net.'"),
    "half precision": ({name: v.half() if v.is_floating_point() else v for name, v in SOURCE.items()}, ""),
    "a backbone": (
        {name.removeprefix("body."): v for name, v in SOURCE.items() if name in BODY},
        "with 'body.' before",
    ),
}


def loaded(content: Any, folder: Path, model: nn.Module, **options: Any) -> Pretrained:
    torch.save(content, folder / "w.pth")
    return load_pretrained(model, str(folder / "w.pth"), **options)


@pytest.mark.parametrize(("content", "how"), [pytest.param(*row, id=name) for name, row in FILES.items()])
def test_the_weights_are_taken_from_whatever_they_are_wrapped_in(content: Any, how: str, tmp_path: Path) -> None:
    model = net()
    head = model["head"].weight.detach().clone()  # type: ignore[index, union-attr, operator]
    pretrained = loaded(content, tmp_path, model)
    assert pretrained.taken == BODY and how in pretrained.found and bool(how) == bool(pretrained.found)
    for name in BODY:
        torch.testing.assert_close(model.state_dict()[name], SOURCE[name], rtol=1e-3, atol=1e-3)
    assert torch.equal(model["head"].weight, head)  # type: ignore[index, union-attr, arg-type]


@pytest.mark.parametrize("wrap", ["module", "_orig_mod"])
def test_a_model_that_is_wrapped_itself_takes_them_too(wrap: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({wrap: net(5)})
    assert len(loaded({"state_dict": SOURCE}, tmp_path, model).taken) == len(SOURCE)


def test_what_was_taken_left_and_not_needed_is_told(tmp_path: Path) -> None:
    pretrained = loaded({"state_dict": {**prefixed("module."), "module.ema.decay": torch.ones(1)}}, tmp_path, net())
    assert pretrained.notes("w.pth") == [
        "took 9 of 11 tensors from w.pth (under 'state_dict', without 'module.'); left as built: head.weight "
        "((5, 8) in the file, (3, 8) in the model), head.bias ((5,) in the file, (3,) in the model)",
        "1 tensors of w.pth are not of this model: module.ema.decay",
    ]


def test_a_file_of_which_less_than_half_fits_is_refused_unless_that_is_wanted(tmp_path: Path) -> None:
    content = {**SOURCE, **{f"decoder.{i}": torch.ones(2) for i in range(20)}}
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"only 9 of its 31 tensors fit .* \(--allow-partial\)"):
        loaded(content, tmp_path, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert loaded(content, tmp_path, model, allow_partial=True).taken == BODY


def test_weights_of_which_nothing_fits_are_an_error_that_shows_the_names_of_both(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none of its 1 tensors fits this model. It has other; the model has bo"):
        loaded({"model_state": {"other": torch.ones(2)}}, tmp_path, net())


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {"state_dict": {}}, torch.ones(3)])
def test_a_file_without_weights_says_what_it_holds(content: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it holds no weights, but (the keys|a )"):
        loaded(content, tmp_path, net())


class SparseConvolution(nn.Module):
    """Stands for spconv's class of that name, which is told by its module."""

    __module__ = "spconv.pytorch.conv"

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


class SubMConv3d(SparseConvolution):
    __module__ = "somebodys.model"


@pytest.mark.parametrize(
    "shape",
    [(8, 3, 3, 3, 4), (3, 3, 3, 8, 4), (8, 3, 3, 4)],
    ids=["3d", "3d by its other algorithm", "2d"],
)
def test_weights_of_spconv_1_are_turned_as_openpcdet_turns_them(shape: tuple[int, ...], tmp_path: Path) -> None:
    """spconv 1: (k, k, k, c_in, c_out).   spconv 2: (c_out, k, k, k, c_in), or (k, k, k, c_out, c_in)."""
    model = nn.Sequential(SubMConv3d(*shape), nn.Conv3d(4, 8, 3))
    before = torch.randn(*[3] * (len(shape) - 2), 4, 8)
    dense = torch.randn(3, 3, 3, 4, 8)  # no sparse one's: it does not fit, and stays as built
    content = {"0.weight": before, "1.weight": dense, "1.bias": torch.zeros(8)}
    pretrained = loaded(content, tmp_path, model)
    wanted = before.transpose(-1, -2) if shape[-2:] == (8, 4) and shape[0] == 3 else before.movedim(-1, 0)
    assert torch.equal(model[0].weight, wanted)
    assert pretrained.taken == ["0.weight", "1.bias"] and pretrained.found == "1 from spconv 1's layout"


def test_weights_of_spconv_2_are_taken_as_they_are(tmp_path: Path) -> None:
    model = nn.Sequential(SubMConv3d(3, 3, 3, 3, 3))  # of which the shape tells nothing
    weight = torch.randn(3, 3, 3, 3, 3)
    assert loaded({"0.weight": weight}, tmp_path, model).found == "" and torch.equal(model[0].weight, weight)
