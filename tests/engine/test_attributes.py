"""Which attributes changed between two looks: what is seen, what is not, and at which cost."""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections import deque
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from raytrain.engine.attributes import Saved, Watch, changes, look, look_into_model


class Thing:
    def __init__(self, value: Any) -> None:
        self.value = value


def after(value: Any, change: Callable[[Any], Any], saved: Saved | None = None) -> list[str]:
    thing = Thing(value)
    before = look({"T": thing})
    change(thing)
    return changes(before, look({"T": thing}), saved or Saved({}, {}))


def bar() -> Any:
    """A progress bar, as of a library."""
    module = ModuleType("bars")
    module.__file__ = "/usr/lib/python3/site-packages/bars.py"
    sys.modules["bars"] = module

    class Bar:
        __module__ = "bars"

        def __init__(self) -> None:
            self.n = 0

        def update(self) -> None:
            self.n += 1

        def close(self) -> None: ...

    return Bar()


def put(value: Any) -> Callable[[Any], Any]:
    return lambda thing: setattr(thing, "value", value)


@pytest.mark.parametrize(
    ("value", "change", "found"),
    [
        (0, put(3), ["T.value (0, now 3)"]),
        (0.5, put(0.25), ["T.value (0.5, now 0.25)"]),
        ("a", put("b"), ["T.value ('a', now 'b')"]),
        ([1], lambda t: t.value.append(2), ["T.value"]),
        ([1, 2], lambda t: t.value.reverse(), ["T.value (1, now 2)"]),
        (deque([1, 2], 2), lambda t: t.value.append(3), ["T.value (1, now 2)"]),
        ({"n": 1}, lambda t: t.value.update(n=2), ["T.value (1, now 2)"]),
        ({1}, lambda t: t.value.add(2), ["T.value"]),
        (np.zeros(3), lambda t: t.value.fill(1), ["T.value"]),
        (np.zeros(10**6), lambda t: t.value.fill(1), ["T.value"]),
        (torch.zeros(3), lambda t: t.value.fill_(1), ["T.value"]),
        (itertools.count(), lambda t: next(t.value), ["T.value"]),
        (Thing(Thing(1)), lambda t: setattr(t.value.value, "value", 2), ["T.value.value.value (1, now 2)"]),
        (SimpleNamespace(n=1), lambda t: setattr(t.value, "n", 2), ["T.value.n (1, now 2)"]),
        (nn.BatchNorm1d(2), lambda t: t.value(torch.rand(4, 2)), None),
        # What is no state
        (bar(), lambda t: t.value.update(), []),
        (None, put(3), []),
        ({}, lambda t: t.value.update(n=2), []),
        (1, lambda t: setattr(t, "other", 2), []),
        (nn.Parameter(torch.ones(1)) * 2, put(nn.Parameter(torch.ones(1)) * 3), []),
        (float("nan"), put(float("nan")), []),
        (print, put(len), []),
        (random.Random(0), lambda t: t.value.random(), []),
        (np.random.default_rng(0), lambda t: t.value.random(), []),
        (np.random.RandomState(0), lambda t: t.value.rand(), []),
        (torch.Generator(), lambda t: torch.rand(1, generator=t.value), []),
    ],
)
def test_it_is_seen(value: Any, change: Callable[[Any], Any], found: list[str] | None) -> None:
    names = after(value, change)
    assert names == found if found is not None else all(name.startswith("T.value.") for name in names) and names


def test_what_a_state_holds_is_saved_by_its_name_or_by_its_values() -> None:
    assert after(0, put(3), Saved({}, look({"task": {"value": 3}}))) == []
    assert after(0, put(3), Saved(look({"task": {"n": 0}}), look({"task": {"n": 3}}))) == []
    assert after(0, put(3), Saved(look({"task": {"n": 1}}), look({"task": {"n": 3}}))) == ["T.value (0, now 3)"]


def test_a_cycle_and_what_is_known_are_not_walked() -> None:
    thing, known = Thing(None), Thing(1)
    thing.value = [thing, known, 5]
    assert look({"T": thing}, [known]) == {"len(T.value)": "3", "T.value[2]": "5"}


def test_torchs_own_modules_cost_nothing_and_long_things_little() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(300)])
    began_s = time.perf_counter()
    assert look_into_model(model) == {}
    many = Thing([list(range(2000)) for _ in range(1000)])
    assert len(look({"T": many})) <= 20_000
    assert time.perf_counter() - began_s < 1


class Positions(nn.Module):
    """Holds what is in no state_dict: a centre that moves, a table that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(2), persistent=False)
        self.register_buffer("table", torch.zeros(2), persistent=False)
        self.register_buffer("saved", torch.zeros(2))
        self.inner = nn.Linear(2, 2)


def hooked(times: int) -> Callable[[Positions], object]:
    return lambda module: [module.inner.register_forward_hook(lambda *_: None) for _ in range(times)]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda module: module.centre.add_(1), ["Positions.centre"]),
        (lambda module: setattr(module, "centre", torch.ones(2)), ["Positions.centre"]),
        (lambda module: setattr(module, "table", torch.ones(5)), []),
        (lambda module: module.saved.add_(1), []),
        (hooked(2), ["Positions.inner._forward_hooks (1, now 3)"]),
        (lambda module: module.register_forward_pre_hook(lambda *_: None), []),
    ],
)
def test_hooks_and_buffers_of_a_model_that_are_not_saved_are_looked_at(
    change: Callable[[Any], object], found: list[str]
) -> None:
    module = Positions()
    hooked(1)(module)
    before = look_into_model(module)
    change(module)
    assert changes(before, look_into_model(module), Saved({}, {})) == found


def test_later_epochs_are_watched_ever_more_seldom_and_each_name_is_told_once() -> None:
    watch = Watch()
    assert [epoch for epoch in range(40) if watch.epoch_begins()] == [0, 1, 2, 4, 8, 16, 32]
    assert watch.new(["T.a (0, now 1)", "T.b"]) == ["T.a (0, now 1)", "T.b"]
    assert watch.new(["T.a (7, now 9)", "T.c"]) == ["T.c"]
