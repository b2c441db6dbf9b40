"""What build_model left in eval mode stays there; the rest trains."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from torch import nn

from raytrain.engine.modes import TrainingMode


class Inner(nn.Module):
    """A module that lets nobody set its BatchNorm to training mode, as frozen backbones do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def train(self, mode: bool = True) -> Inner:
        super().train(mode)
        self.norm.eval()
        return self


def net() -> nn.Sequential:
    body = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    return nn.Sequential(body, nn.ModuleList([nn.Linear(2, 2), nn.BatchNorm1d(2)]), nn.Linear(2, 2))


def changed(change: Callable[[nn.Sequential], object]) -> nn.Module:
    model = net()
    change(model)
    return model


def eval_but_for_the_head(model: nn.Sequential) -> None:
    model.eval()
    model[2].train()


def eval_but_for_one_inside(model: nn.Sequential) -> None:
    model[0].eval()
    model[0][2].train()


def frozen(model: nn.Sequential) -> None:
    model[0].requires_grad_(False).eval()


WHOLE = ["", "0", "0.0", "0.1", "0.2", "1", "1.0", "1.1", "2"]


@pytest.mark.parametrize(
    ("change", "in_training", "said"),
    [
        (lambda model: None, WHOLE, []),
        (frozen, ["", "1", "1.0", "1.1", "2"], ["left them, also while training: 0$"]),
        (
            lambda model: model[0].eval(),
            ["", "1", "1.0", "1.1", "2"],
            [r"training: 0\. Parameters of 0 are trained; if"],
        ),
        (lambda model: model[0][1].eval(), [n for n in WHOLE if n != "0.1"], ["while training: 0.1"]),
        (lambda model: model[1][1].eval(), [n for n in WHOLE if n != "1.1"], ["while training: 1.1"]),
        (eval_but_for_the_head, ["", "2"], [r"while training: 0, 1\."]),
        (eval_but_for_one_inside, ["", "0.2", "1", "1.0", "1.1", "2"], [r"while training: 0\."]),
        (lambda model: model.eval(), WHOLE, ["gave the model in eval mode as a whole: it trains in training mode"]),
        (lambda model: model.append(Inner().train()), [*WHOLE, "3"], ["while training: 3.norm"]),
    ],
)
def test_what_is_in_eval_mode_stays_there(
    change: Callable[[nn.Sequential], object], in_training: list[str], said: list[str]
) -> None:
    model = changed(change)
    mode = TrainingMode(model)
    for _ in range(2):
        mode.begin()
        assert [name for name, module in model.named_modules() if module.training] == in_training
        model.eval()
        assert not any(module.training for module in model.modules())
    assert len(mode.notes) == len(said)
    for note, pattern in zip(mode.notes, said, strict=True):
        assert re.search(pattern, note), note
