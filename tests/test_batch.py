"""Batches and predictions in any container that people use: moved, with nothing else of them changed."""

from __future__ import annotations

import collections
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import attrs
import numpy as np
import pytest
import torch

from raytrain.batch import is_seen_through, map_tensors, move_to, tensorised, tensors_of
from raytrain.errors import TaskError

POINTS = torch.arange(3.0)


class Named(NamedTuple):
    points: Any
    name: str


class Strict(tuple):
    """Its constructor takes two things; a tuple's takes one."""

    def __new__(cls, points: Any, name: str) -> Strict:
        return super().__new__(cls, (points, name))


@dataclasses.dataclass
class Counted:
    points: Any
    name: str
    count: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.count = len(self.points)
        self.points = self.points.clone()  # a second initialisation would show


@dataclasses.dataclass(frozen=True)
class Frozen:
    points: Any
    name: str


@attrs.define
class Attrs:
    points: Any
    name: str


class Encoding(collections.UserDict):  # type: ignore[type-arg]
    """As transformers' BatchEncoding: a mapping, with attributes of its own and a `to`."""

    def __init__(self, data: Any, encodings: Any = None) -> None:
        super().__init__(data)
        self.encodings = encodings

    def to(self, device: Any) -> Encoding:
        raise AssertionError("it is a mapping, and is treated as one")


class ReadOnly(Mapping[str, Any]):
    def __init__(self, **entries: Any) -> None:
        self.entries = entries

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


ENTRIES = {"points": POINTS, "name": "scene"}
CONTAINERS: dict[str, Any] = {
    "dict": ENTRIES,
    "OrderedDict": collections.OrderedDict(ENTRIES),
    "defaultdict": collections.defaultdict(list, ENTRIES),
    "UserDict": collections.UserDict(ENTRIES),
    "ChainMap": collections.ChainMap({"points": POINTS}, {"name": "scene", "points": 0}),
    "MappingProxyType": types.MappingProxyType(ENTRIES),
    "Encoding": Encoding(ENTRIES, encodings="kept"),
    "namedtuple": Named(POINTS, "scene"),
    "tuple": (POINTS, "scene"),
    "a tuple's subclass": Strict(POINTS, "scene"),
    "list": [POINTS, "scene"],
    "dataclass": Counted(POINTS, "scene"),
    "frozen dataclass": Frozen(POINTS, "scene"),
    "attrs": Attrs(POINTS, "scene"),
    "one in another": {"a": [Frozen((POINTS, collections.Counter(x=2)), "scene")]},
}
containers = pytest.mark.parametrize("batch", [pytest.param(value, id=name) for name, value in CONTAINERS.items()])


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2


@containers
def test_a_container_keeps_its_kind_and_all_that_is_no_tensor(batch: Any) -> None:
    before = repr(batch)
    mapped = map_tensors(doubled, batch)
    assert type(mapped) is type(batch)
    assert [t.tolist() for t in tensors_of(mapped)] == [[0, 2, 4]]
    assert [t.tolist() for t in tensors_of(batch)] == [[0, 1, 2]], "the task's own stays as it is"
    assert repr(map_tensors(lambda tensor: tensor / 2, mapped)) == repr(batch) == before


@containers
def test_what_need_not_be_moved_is_handed_on_itself(batch: Any) -> None:
    assert move_to(batch, torch.device("cpu")) is batch


def test_a_defaultdict_keeps_its_factory_and_an_encoding_its_attributes() -> None:
    mapped = map_tensors(doubled, CONTAINERS["defaultdict"])
    mapped["new"].append(1)
    assert mapped["new"] == [1] and map_tensors(doubled, CONTAINERS["Encoding"]).encodings == "kept"


def test_counts_are_counts_when_arrays_become_tensors() -> None:
    batch = {"names": collections.Counter(["a", "b", "a"]), "boxes": np.zeros((2, 7)), "text": np.array(["a"])}
    batch["labels"] = [np.float32(1.5)]  # type: ignore[assignment]
    made = tensorised(batch)
    assert made["names"] == {"a": 2, "b": 1} and made["text"] is batch["text"]
    assert made["boxes"].shape == (2, 7) and made["labels"][0].dtype is torch.float32


def test_arrays_in_an_object_of_the_users_stay_arrays() -> None:
    batch = [Frozen(np.zeros(3), "scene"), Attrs(np.zeros(3), "scene")]
    assert tensorised(batch) is batch


def test_what_has_a_way_of_its_own_goes_that_way_and_not_beside_the_computation() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    moved = move_to({"words": packed}, torch.device("cpu"))["words"]
    assert type(moved) is type(packed) and moved.data.tolist() == packed.data.tolist()
    assert not is_seen_through({"words": packed}) and is_seen_through({"words": POINTS})


def test_a_mapping_that_can_neither_be_changed_nor_made_anew_is_named() -> None:
    with pytest.raises(TaskError, match=r"tensors in a ReadOnly, .* give a dict, or write to_device"):
        map_tensors(doubled, ReadOnly(points=POINTS))
    assert move_to(ReadOnly(points=POINTS), torch.device("cpu"))["points"] is POINTS


@pytest.mark.parametrize("change", [doubled, torch.clone])
def test_a_mapping_whose_copy_shares_its_memory_is_changed_at_most_as_its_own_to_would(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    class Shares(dict):  # type: ignore[type-arg]
        def __copy__(self) -> Shares:
            return self

    assert [t.tolist() for t in tensors_of(map_tensors(change, Shares(ENTRIES)))] == [change(POINTS).tolist()]
