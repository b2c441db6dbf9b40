"""How much a swept key matters is a share that neither early stopping nor chance adds to."""

from __future__ import annotations

from typing import Any

import pytest
from sweeps_for_tests import CLIP, LR, OPTIMIZER, sweep_under_way

from raytrain.sweep.importance import importance, key_facts, scores_of


def test_a_trial_that_was_stopped_early_is_compared_where_it_was() -> None:
    slow_start = [0.1, 0.2, 0.9]
    view = sweep_under_way([{LR: 0.1}] * 3, [slow_start, [0.3], [0.2, 0.1]])
    assert scores_of(view) == {0: 0.5, 1: 1.0, 2: 0.0}  # 0 loses to 1 at epoch 1 and beats 2 at epoch 2


def test_importance_finds_a_best_value_in_the_middle_of_a_range_and_takes_off_what_chance_explains() -> None:
    rates = [10 ** (-4 + 0.2 * i) for i in range(21)]
    params = [{LR: rate, CLIP: float(i * 7 % 21), OPTIMIZER: "ab"[i % 2]} for i, rate in enumerate(rates)]
    curves: list[list[float | None]] = [[1 - 0.1 * abs(i - 10)] for i in range(21)]
    found = importance(sweep_under_way(params, curves, space={LR: {"loguniform": [1e-4, 1.0]}}))
    assert found[0].key == LR
    assert found[0].share > 0.8
    assert found[0].says == "best near 0.01"
    assert all(factor.share < 0.2 for factor in found[1:])
    assert found == importance(sweep_under_way(params, curves, space={LR: {"loguniform": [1e-4, 1.0]}}))


def test_importance_of_a_choice_names_the_best_one() -> None:
    params = [{OPTIMIZER: "ab"[i % 2]} for i in range(8)]
    found = importance(sweep_under_way(params, [[0.1 + 0.5 * (i % 2) + 0.01 * i] for i in range(8)]))
    assert (found[0].name, found[0].says) == ("OPTIMIZER", "best with b")
    assert found[0].share > 0.7


@pytest.mark.parametrize(
    "values",
    [
        [0.1] * 5,
        [0, 1e-300, 0, 1e-300, 0],
        [0, 1e-17, 1, 1e-17, 0],
        [1, 1 + 2**-52, 1, 1, 1 + 2**-52],
        [5e-324, 0, 5e-324, 0, 0],
        [-1e300, 0, 1e300, 5e299, -1e300],
        [1.7e308, -1.7e308, 1.7e308, 0, 1],
        [10**400, 1, 10**400, 10, 1],
        [10**400, -(10**400), 0, 1, 2],
        [1e-300, 1e300, 1.0, 1e-300, 1e300],
    ],
)
def test_importance_of_values_that_are_all_one_or_out_of_reach_is_a_share_without_a_warning(values: list[Any]) -> None:
    params = [{LR: value} for value in values]  # warnings are errors here
    for space in ({}, {LR: {"loguniform": [1e-320, 1.0]}}):
        (found,) = importance(sweep_under_way(params, [[0.1], [0.4], [0.3], [0.2], [0.5]], space=space))
        assert 0 <= found.share <= 1
        assert "nan" not in found.says and "inf" not in found.says


def test_an_axis_is_logarithmic_where_the_space_says_so_or_a_choice_spans_decades() -> None:
    params = [
        {"A.LR": 0.1, "B.LR": 1.0, "C": 3, "D": None, "E": 1},
        {"A.LR": 0.2, "B.LR": 1000.0, "C": 4, "D": 1.0, "E": 10**400},
    ]
    space = {"A.LR": {"loguniform": [0.01, 1]}, "B.LR": {"choice": [1, 1000]}, "C": {"uniform": [0, 10]}}
    view = sweep_under_way(params, [[0.5], [0.6]], space=space)
    facts = [key_facts(view, key) for key in view.keys]
    assert [(f["name"], f["kind"], f["log"], f["range"]) for f in facts] == [
        ("A.LR", "number", True, [0.01, 1.0]),
        ("B.LR", "number", True, None),
        ("C", "number", False, [0.0, 10.0]),
        ("D", "choice", False, None),
        ("E", "number", True, None),
    ]
