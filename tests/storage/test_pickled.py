"""A pickle is described as what it would make, and nothing of it is made."""

from __future__ import annotations

import pickle
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest

from raytrain.errors import CheckpointError
from raytrain.storage.pickled import Made, Named, described

SHARED = [1]
PLAIN = [
    {"a": 1, "b": [2.5, None, True, False], "c": ("x",), "d": (1, 2), "e": (1, 2, 3), "f": (1, 2, 3, 4), "g": ()},
    [SHARED, SHARED, {}, [], b"bytes", "", -1, 300, 70000, 1 << 70, -(1 << 31)],
    OrderedDict(z=1, a=OrderedDict()),
    defaultdict(list, x=[1]),
    list(range(3000)),
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", PLAIN, ids=range(len(PLAIN)))
def test_plain_values_are_described_as_they_are(value: Any, protocol: int) -> None:
    if protocol == 2 and b"bytes" in value:
        value = [each for each in value if each != b"bytes"]  # which are a call there
    assert described(pickle.dumps(value, protocol)) == value


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_it_would_call_is_named_and_not_called(tmp_path: Path, protocol: int) -> None:
    made = described(pickle.dumps({"w": Bomb(tmp_path / "fell")}, protocol))["w"]
    assert isinstance(made, Made)
    assert not (tmp_path / "fell").exists()


def test_what_would_be_put_into_an_object_follows_its_arguments() -> None:
    made = described(pickle.dumps(Counter("aab"), 2))
    assert isinstance(made, Made) and made.of == Named("collections.Counter")
    assert made.arguments == [{"a": 2, "b": 1}]


@pytest.mark.parametrize(
    "text", [b"", b"no pickle", b"\x80\x02.", b"\x80\x02(", b"\x80\x02R.", b"\x80\x02h\x07.", b"\x80\x02]]u."]
)
def test_what_is_no_pickle_is_an_error(text: bytes) -> None:
    with pytest.raises(CheckpointError, match="its pickle cannot be read"):
        described(text)
