"""What is recorded beside the loss is the mean over all ranks, whichever names each of them has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optimization import OPTIMIZATION, settings
from processes import Pair
from torch import nn

from raytrain.engine.engine import Engine
from raytrain.engine.terms import MAX_TERMS, Key, Sum
from raytrain.engine.world import World

Given = dict[str, tuple[Any, Any]]  # name -> (sum, what it counts)
TENSOR, WHOLE, FINE = torch.tensor(3.0), torch.tensor(6), torch.tensor(1.5, dtype=torch.float64)

# For each step what rank 0 and rank 1 give, None where no record is due; and the means.
STEPS: dict[str, list[tuple[tuple[Given, Given] | None, dict[str, float] | None]]] = {
    "alike": [(({"a": (1.0, 0.5)}, {"a": (2.0, 0.5)}), {"a": 3.0})],
    "numbers and tensors": [
        (({"a": (TENSOR, 1.0), "b": (2, 1)}, {"a": (1.0, 1.0), "b": (WHOLE, 1)}), {"a": 2.0, "b": 4.0}),
        (({"a": (FINE, 1.0)}, {"a": (FINE, 2.0)}), {"a": 1.0}),
    ],
    "weights": [(({"a": (6.0, 2.0)}, {"a": (TENSOR, torch.tensor(1.0))}), {"a": 3.0})],
    "other names on each": [(({"a": (1.0, 1.0)}, {"b": (4.0, 2.0), "a": (3.0, 1.0)}), {"a": 2.0, "b": 2.0})],
    "nothing on one": [(({}, {"b": (4.0, 2.0)}), {"b": 2.0})],
    "nothing at all": [(({}, {}), {})],
    "gone for a step": [
        (({"a": (1.0, 1.0), "b": (1.0, 1.0)}, {"a": (3.0, 1.0)}), {"a": 2.0, "b": 1.0}),
        (({"a": (1.0, 1.0)}, {"a": (5.0, 1.0)}), {"a": 3.0}),
        (({"a": (1.0, 1.0), "b": (1.0, 1.0)}, {"b": (3.0, 1.0)}), {"a": 1.0, "b": 2.0}),
    ],
    "steps between records": [
        (({"a": (1e30, 1.0)}, {"a": (1e30, 1.0)}), {"a": 1e30}),
        *[(None, None)] * 40,  # a sum in place that were never emptied would be infinite by now
        (({"a": (1.0, 1.0)}, {"a": (3.0, 1.0)}), {"a": 2.0}),
    ],
    "a name that comes later": [
        (({"a": (1.0, 1.0)}, {"a": (1.0, 1.0)}), {"a": 1.0}),
        (({"a": (1.0, 1.0)}, {"a": (1.0, 1.0), "rare": (2.0, 1.0)}), {"a": 1.0}),
        (None, None),
        (({"a": (1.0, 1.0), "rare": (4.0, 1.0)}, {"rare": (2.0, 1.0)}), {"a": 1.0, "rare": 3.0}),
    ],
    "more than ride": [
        (
            ({f"n{i}": (float(i), 1.0) for i in range(MAX_TERMS + 9)}, {f"n{i}": (1.0, 1.0) for i in range(80)}),
            {f"n{i}": (i + 1) / 2 if i < MAX_TERMS + 9 else 1.0 for i in range(80)},
        )
    ]
    * 2,
}


def recorded(rank: int, kind: str, reduction: str) -> tuple[list[dict[Key, float] | None], list[str]]:
    engine = Engine(
        nn.Linear(2, 1),
        SimpleNamespace(**{**OPTIMIZATION, "OPTIMIZER": "sgd", "LR": 0.1}),
        World(rank, 2, 2),
        reduction,
    )
    means: list[dict[Key, float] | None] = []
    for given, _ in STEPS[kind]:
        engine.zero_grad()
        engine.backward(engine.model(torch.ones(1, 2)).sum(), 0.5)
        terms = None if given is None else [{("tb_dict", n): Sum(*pair) for n, pair in given[rank].items()}]
        found = engine.step(settings(0.0), (), terms).terms
        means.append(None if found is None else {key: float(mean) for key, mean in found.items()})
    return means, engine.notes


@pytest.mark.parametrize("reduction", ["shared_memory", "collective"])
@pytest.mark.parametrize("kind", STEPS)
def test_terms_are_means_over_all_ranks(pair: Pair, kind: str, reduction: str) -> None:
    expected = [
        None if means is None else {("tb_dict", n): mean for n, mean in means.items()} for _, means in STEPS[kind]
    ]
    (first, notes), (second, _) = pair.run(recorded, kind, reduction)
    assert first == second
    for found, means in zip(first, expected, strict=True):
        assert found == (None if means is None else pytest.approx(means, rel=1e-6))
    told = ["tb_dict['rare'] came up after training began: recorded from here on, as the mean over all workers"]
    assert notes == (told if "later" in kind else [])


def test_one_process_needs_nobody() -> None:
    for changes in ({}, {"ENGINE": "ddp"}):
        engine = Engine(
            nn.Linear(2, 1), SimpleNamespace(**{**OPTIMIZATION, "OPTIMIZER": "sgd", "LR": 0.1, **changes}), World()
        )
        engine.zero_grad()
        engine.backward(engine.model(torch.ones(1, 2)).sum(), 1.0)
        terms = [{("tb_dict", "a"): Sum(torch.tensor(3.0), 2.0), ("disp_dict", "b"): Sum(4.0, 1.0)}]
        assert engine.step(settings(0.0), (), terms).terms == {("tb_dict", "a"): 1.5, ("disp_dict", "b"): 4.0}
