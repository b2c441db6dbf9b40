"""What is reached from an object: by paths that one would write, without running anything of the user's."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import OrderedDict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from own_generators import OF_THE_MODULE, Closed, OfTheClass, OfTheModule, Slotted

from raytrain.engine.object_graph import MAX_ENTRIES, MAX_HELD, MAX_OBJECTS, difference, values_of, walk

LEAF = object()
Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass
class Holder:
    leaf: Any


class Slots:
    __slots__ = ("__dict__", "leaf")

    def __init__(self, leaf: Any) -> None:
        self.leaf = leaf

    def method(self) -> None: ...


class Guarded(Holder):
    """Whatever is asked of it that is not simply there raises."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    @property
    def computed(self) -> Any:
        raise RuntimeError("computed")

    def __iter__(self) -> Any:
        raise RuntimeError("iterated")

    def __len__(self) -> int:
        raise RuntimeError("measured")


@pytest.mark.parametrize(
    ("root", "path"),
    [
        ([0, [LEAF]], "x[1][0]"),
        ({"a": {3: LEAF}}, "x['a'][3]"),
        (OrderedDict(a=deque([LEAF])), "x['a'][0]"),
        (Pair(1, LEAF), "x[1]"),
        (Holder(LEAF), "x.leaf"),
        (Slots(Holder(LEAF)), "x.leaf.leaf"),
        pytest.param(Guarded(LEAF), "x.leaf", id="guarded"),
        (functools.partial(print, 1, end=LEAF), "x.keywords['end']"),
        (Slots(LEAF).method, "x.__self__.leaf"),
        ((lambda leaf: lambda: leaf)(LEAF), "x.leaf"),
        (np.array([None, LEAF]), "x[1]"),
        (torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ModuleDict({})), None),
    ],
)
def test_each_thing_is_reached_by_its_path(root: Any, path: str | None) -> None:
    assert [where for where, value in walk({"x": root}) if value is LEAF] == ([path] if path else [])


def test_what_classes_and_functions_hold_is_the_users_code_alone() -> None:
    kinds = type(OF_THE_MODULE), type(OfTheClass.rng)

    def reached(root: Any) -> list[str]:
        return [path for path, value in walk({"x": root}, into_code=True) if isinstance(value, kinds)]

    assert "own_generators.OfTheClass.rng" in reached(OfTheClass())
    assert reached(OfTheModule()) == ["own_generators.OF_THE_MODULE"]
    assert reached(Closed()) == ["x.transform.rng"]
    assert [path for path, value in walk({"x": Slotted()}) if isinstance(value, torch.Generator)] == [
        "x.transform.generator"
    ]


def test_a_ring_ends_and_a_thing_that_is_held_twice_comes_once_by_the_nearest_path() -> None:
    ring: list[Any] = [LEAF]
    ring.append({"back": ring, "again": Holder(LEAF)})
    assert [path for path, value in walk({"x": ring}) if value is LEAF] == ["x[0]"]


def test_a_long_list_of_data_neither_takes_long_nor_hides_what_stands_behind_it() -> None:
    root = {"annotations": [{"box": [1.0, 2.0], "name": str(i)} for i in range(50_000)], "transform": [[Holder(LEAF)]]}
    began_s = time.perf_counter()
    reached = list(walk({"x": root}))
    assert time.perf_counter() - began_s < 1.0  # 35 ms on two cores
    assert len(reached) <= 4 * MAX_OBJECTS
    assert sum(path.startswith("x['annotations'][") for path, _ in reached) > MAX_ENTRIES
    assert [path for path, value in reached if value is LEAF] == ["x['transform'][0][0].leaf"]


def test_lists_of_lists_of_numbers_take_no_longer() -> None:
    root = {"boxes": [[float(i) for i in range(1_000)] for _ in range(2_000)], "transform": Holder(LEAF)}
    began_s = time.perf_counter()
    reached = list(walk({"x": root}))
    assert time.perf_counter() - began_s < 2.0
    assert len(reached) <= MAX_HELD + 1
    assert [path for path, value in reached if value is LEAF] == ["x['transform'].leaf"]


def test_each_of_many_data_sets_is_reached() -> None:
    many = torch.utils.data.ConcatDataset([Slotted() for _ in range(1_500)])
    assert sum(isinstance(value, torch.Generator) for _, value in walk({"x": many})) == 1_500


def changed(value: Any) -> Any:
    """A copy that differs in one place."""
    if isinstance(value, dict):
        return {**value, "a": changed(value["a"])}
    if isinstance(value, list):
        return [*value[:-1], changed(value[-1])]
    if isinstance(value, torch.Tensor):
        return value.clone().index_fill_(0, torch.tensor([1]), 5)
    if isinstance(value, np.ndarray):
        return np.concatenate([value[:1], value[1:] + 1])
    return Holder(changed(value.leaf)) if isinstance(value, Holder) else value + 1


@pytest.mark.parametrize(
    ("value", "at"),
    [
        ({"a": 1, "b": float("nan")}, "['a']"),
        ([0, 1.5], "[1]"),
        (torch.tensor([float("nan"), 1.0]), ""),
        (torch.arange(6).reshape(2, 3).t(), ""),
        (torch.ones(3, dtype=torch.bfloat16), ""),
        (np.arange(4, dtype="f4"), ""),
        ({"a": Holder(torch.zeros(2, 2))}, "['a'].leaf"),
        (Holder([np.float32(1)]), ".leaf[0]"),
    ],
)
def test_values_are_equal_where_nothing_changed_and_name_the_place_where_something_did(value: Any, at: str) -> None:
    before = values_of({"": value})
    assert difference(before, values_of({"": value})) is None
    assert difference(before, values_of({"": changed(value)})) == at


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, True), (1, 1.0), (0.0, torch.zeros(())), ([1], (1,)), ([], [0]), (np.zeros(2), np.zeros((2, 1))), (b"a", "a")],
)
def test_values_of_another_type_or_shape_differ(one: Any, other: Any) -> None:
    assert difference(values_of({"x": [one]}), values_of({"x": [other]})) is not None


@pytest.mark.parametrize(
    "value",
    [
        torch.eye(3).to_sparse(),
        torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        torch.empty(3, device="meta"),
        torch.ones(3, dtype=torch.complex64).conj(),
        np.array([{}, object()]),
        np.array("text"),
        np.datetime64("2020-01-01"),
        object(),
        iter([1]),
    ],
)
def test_what_cannot_be_seen_into_is_no_error_and_no_difference(value: Any) -> None:
    assert difference(values_of({"x": value}), values_of({"x": value})) is None
