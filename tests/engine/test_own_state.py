"""What tasks and data sets give to be saved: kept as it was, or refused by name."""

from __future__ import annotations

import copy
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tasks_for_units import PointsTask
from tasks_with_state import Kept, KeptWalking, Walking
from torch.utils.data import ConcatDataset, Subset

from raytrain.engine.own_state import OwnState, decoded, encoded, is_same
from raytrain.errors import CheckpointError, TaskError
from raytrain.storage.state_file import dumps, loads


@pytest.mark.parametrize(
    "value",
    [
        *(3, 2**100, -0.5, 1 + 2j, "text", b"bytes", None, True),
        *({"a": [1, (2.0, "x")], 4: {}}, {1, 2, 3}),
        *(np.arange(6, dtype=np.uint32).reshape(2, 3), np.zeros((0, 3)), np.array("abc"), np.float32(2.5)),
        *(np.array(["2020-01-01"], dtype="M8[D]"), np.arange(6)[::2], np.array([True])),
        *(torch.arange(3.0), torch.zeros(2, dtype=torch.bfloat16), torch.tensor(True)),
        *(random.Random(1).getstate(), np.random.default_rng(1).bit_generator.state),
        *(np.random.RandomState(1).get_state(), torch.Generator().get_state()),
    ],
    ids=str,
)
def test_it_comes_back_as_it_was(value: Any) -> None:
    data = dumps({"model_state": {}, "own": encoded({"value": value}, "T")})
    found = decoded(loads(memoryview(data), "here")["own"])["value"]
    assert type(found) is type(value)
    assert repr(found) == repr(value)  # of arrays within tuples too
    if isinstance(value, (np.ndarray, np.generic)):
        assert found.dtype == value.dtype and found.shape == value.shape


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda: 0, "T is a builtins.function"),
        ({"net": torch.nn.Linear(1, 1)}, r"T\['net'\] is a torch.nn.modules.linear.Linear"),
        ([1, {"rng": np.random.default_rng()}], r"T\[1\]\['rng'\] is a numpy.random._generator.Generator"),
        (np.array([object()]), "T is a numpy.ndarray"),
        (Counter("ab"), "T is a collections.Counter"),
        ({(1, 2): 3}, r"T has the key \(1, 2\), a tuple"),
        (torch.eye(2).to_sparse(), "T is a torch.Tensor"),
    ],
)
def test_what_no_checkpoint_can_hold_is_named(value: Any, said: str) -> None:
    with pytest.raises(TaskError, match=f"^{said}, which no checkpoint holds.*Give tensors, arrays, numbers"):
        encoded(value, "T")


class HalfTask(PointsTask):
    def state_dict(self) -> dict[str, Any]:
        return {}


class Refusing(KeptWalking):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise KeyError("made")


def test_states_of_wrapped_data_sets_are_found() -> None:
    plain, kept = Walking(4), KeptWalking(4)
    wrapped = Subset(ConcatDataset([plain, kept]), range(3))
    own = OwnState.of(PointsTask(None), {"train": wrapped, "val": kept})  # type: ignore[arg-type]
    assert own.owners == {"train data set.dataset.datasets[1]": kept, "val data set": kept}
    task = Kept(None)  # type: ignore[arg-type]
    assert list(OwnState.of(task, {"train": plain}).owners) == ["task"]


@pytest.mark.parametrize(
    ("held", "where"),
    [
        (lambda kept: {"base": kept}, ".base"),
        (lambda kept: {"parts": [Walking(4), kept]}, ".parts[1]"),
        (lambda kept: {"by_name": {"day": kept}}, ".by_name['day']"),
        (lambda kept: {"base": Subset(kept, [0])}, ".base.dataset"),
        (lambda kept: {"base": holding({"base": kept})}, ".base.base"),
        (lambda kept: {"transform": torch.nn.Sequential(), "names": ["a"], "base": kept}, ".base"),
    ],
)
def test_a_state_is_found_in_any_wrapper(held: Any, where: str) -> None:
    kept = KeptWalking(4)
    wrapper = holding(held(kept))
    wrapper.itself = wrapper
    own = OwnState.of(PointsTask(None), {"train": wrapper})  # type: ignore[arg-type]
    assert own.owners == {f"train data set{where}": kept}


def holding(held: dict[str, Any]) -> Any:
    wrapper = Walking(4)
    vars(wrapper).update(held)
    return wrapper


def test_only_what_has_moved_is_given_back() -> None:
    calm, moved = Refusing(1), KeptWalking(1)
    own = OwnState({"calm": calm, "moved": moved})
    before = own.save()
    moved.made = 5
    own.put_back(before, "here")
    assert moved.made == 0


@pytest.mark.parametrize(
    "value", [1.5, "text", [1, {"a": (2, None)}], torch.arange(3), np.arange(3), {1, 2}, {"a": torch.zeros(2)}]
)
def test_a_state_is_the_same_as_itself_and_no_other(value: Any) -> None:
    one, same, other = (encoded(each, "T") for each in ([value, 1], copy.deepcopy([value, 1]), [value, 2]))
    assert is_same(one, same) and not is_same(one, other)
    assert not is_same(encoded([torch.zeros(2)], "T"), encoded([torch.ones(2)], "T"))
    assert not is_same(1, 1.0)


def test_half_a_state_is_refused() -> None:
    with pytest.raises(TaskError, match=r"HalfTask has state_dict\(\) but no load_state_dict\(state\); write both"):
        OwnState.of(HalfTask(None), {})  # type: ignore[arg-type]


def test_what_does_not_fit_a_checkpoint_is_told() -> None:
    own, kept = OwnState({"task": KeptWalking(1)}), KeptWalking(1)
    assert own.load({"task": {"made": 7}}, "x") == [] and own.owners["task"].made == 7
    [begins, left] = own.load({"val data set": {}}, "x")
    assert begins == "the checkpoint holds no state of the task: KeptWalking begins with its own"
    assert left == "the checkpoint holds state of the val data set, which has no load_state_dict(): it is left out"
    with pytest.raises(CheckpointError, match=r"x: Refusing.load_state_dict\(\) refuses the state.*KeyError: 'made'"):
        OwnState({"task": Refusing(1)}).load({"task": {}}, "x")
    assert kept.made == 0
