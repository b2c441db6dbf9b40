"""What checkpoint.pth holds, as bytes: laid out, filled in, and read without running any code that is in it.

A state is saved often and its shape hardly ever changes, so a Blueprint keeps all of the file but the tensors
and numbers: to save once more is to copy these to their places.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import struct
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import torch

from raytrain.errors import CheckpointError
from raytrain.storage.checkpoint import MANIFEST, PAYLOAD, check_sha256, damage_named, read_manifest
from raytrain.storage.paths import expanded
from raytrain.storage.storage import Storage, open_storage

LARGE_BYTES = 32 << 20  # of a state that several threads copy
COPIERS = 4  # at most
INT32 = range(-(2**31), 2**31)
PICKLED = b"\x80\x02"  # how a pickle of torch.save begins
FIRST_INT, FIRST_FLOAT = 0x5A3C0000, 0x43E5A3C900000000  # stand for the numbers of a payload while it is laid out


class Leaves(NamedTuple):
    """A payload taken apart: its tensors and numbers in their order, and all that holds them together."""

    tensors: list[torch.Tensor]
    numbers: list[int | float]
    frame: list[Any]


def leaves_of(payload: dict[str, Any]) -> Leaves:
    leaves = Leaves([], [], [])
    _take_apart(payload, leaves)
    return leaves


def _take_apart(value: Any, leaves: Leaves) -> None:
    kind = type(value)
    if kind is dict:
        leaves.frame.append((kind, len(value)))
        for key, each in value.items():
            leaves.frame.append(key)
            _take_apart(each, leaves)
    elif kind is list or kind is tuple:
        leaves.frame.append((kind, len(value)))
        for each in value:
            _take_apart(each, leaves)
    elif isinstance(value, torch.Tensor):
        leaves.tensors.append(value)
        leaves.frame.append(torch.Tensor)
    elif kind is float or (kind is int and value in INT32):
        leaves.numbers.append(value)
        leaves.frame.append(kind)
    else:
        leaves.frame.append(value)


def _put_together(frame: list[Any], tensors: Sequence[Any], numbers: Sequence[Any]) -> Any:
    """The payload whose leaves these are."""
    parts, tensors_left, numbers_left = iter(frame), iter(tensors), iter(numbers)

    def build() -> Any:
        part = next(parts)
        if part is torch.Tensor:
            return next(tensors_left)
        if part is int or part is float:
            return next(numbers_left)
        if type(part) is not tuple:
            return part
        kind, count = part
        if kind is dict:
            return {next(parts): build() for _ in range(count)}
        return kind([build() for _ in range(count)])

    return build()


class Blueprint:
    """checkpoint.pth of all payloads that differ from one in the values of their tensors and numbers alone.

    size_bytes: of the file
    """

    def __init__(self, leaves: Leaves) -> None:
        """OddPayload if there are tensors where nothing but values is expected."""
        self._kinds = _kinds_of(leaves.tensors)
        stand_ins, marks = _stand_ins(leaves.tensors, self._kinds), _marks_of(leaves.numbers)
        file = _saved(_put_together(leaves.frame, stand_ins, marks))
        self._places = _places_of(marks, file)
        self._fixed_numbers: list[int | float] = []
        if len(self._places) < len(marks):  # some cannot be told apart in there: it is good for these numbers only
            self._places, self._fixed_numbers = [], leaves.numbers
            file = _saved(_put_together(leaves.frame, stand_ins, leaves.numbers))
        self._texts, self.size_bytes = file.texts, file.size_bytes
        self._tensors = _tensor_places(stand_ins, file)
        try:  # a Counter, a set that the model goes on to change would always be equal to itself
            self._frame = copy.deepcopy(leaves.frame)
        except Exception as error:  # anybody's objects
            raise OddPayload from error

    def fits(self, leaves: Leaves) -> bool:
        """Whether it is the blueprint of this payload too."""
        try:
            same = leaves.frame == self._frame
        except (ValueError, RuntimeError):  # arrays do not say whether they are equal
            return False
        numbers_fit = not self._fixed_numbers or self._fixed_numbers == leaves.numbers
        return same and numbers_fit and _kinds_of(leaves.tensors) == self._kinds

    def sheet(self, memory: memoryview) -> Sheet:
        """`memory` (size_bytes of it) with all written there that does not change."""
        for at, text in self._texts:
            memory[at : at + len(text)] = text
        return Sheet(memory, self._tensors, self._places)


class Sheet:
    """A checkpoint.pth in memory, whose tensors and numbers can be filled in again and again."""

    def __init__(self, memory: memoryview, tensors: Sequence[TensorPlace], places: Sequence[NumberPlace]) -> None:
        self._memory, self._places = memory, places
        self._first = [place.first for place in tensors]
        self._views = [place.view(memory) for place in tensors]
        self._is_large = sum(view.nbytes for view in self._views) >= LARGE_BYTES
        self._written: list[int | float | None] = [None] * len(places)

    def fill(self, leaves: Leaves) -> None:
        """Copies tensors and numbers to their places; from a GPU without waiting for them to arrive."""
        sources = [leaves.tensors[index] for index in self._first]
        if self._is_large and not any(source.is_cuda for source in sources):
            copy_in_threads(self._views, sources)
        elif sources:
            torch._foreach_copy_(self._views, sources, non_blocking=True)
        for index, (number, written) in enumerate(zip(leaves.numbers, self._written, strict=False)):
            if number != written:
                at, form = self._places[index]
                struct.pack_into(form, self._memory, at, number)
                self._written[index] = number


def copy_in_threads(views: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Each source's values to its view. Two threads take 50 ms for 600 MB, one 94: it has half of the bandwidth."""
    size_bytes = sum(view.nbytes for view in views)
    count = min(COPIERS, len(os.sched_getaffinity(0)))
    parts: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = [([], []) for _ in range(count)]
    copied_bytes = 0
    for view, source in zip(views, sources, strict=True):
        pairs = [(view, source.detach())]
        if view.nbytes > LARGE_BYTES // COPIERS and view.is_contiguous() and source.is_contiguous():
            pairs = list(zip(view.view(-1).chunk(count), source.detach().view(-1).chunk(count), strict=True))
        for to, values in pairs:
            part = parts[min(copied_bytes * count // size_bytes, count - 1)]
            part[0].append(to)
            part[1].append(values)
            copied_bytes += to.nbytes

    def copy_part(part: tuple[list[torch.Tensor], list[torch.Tensor]]) -> None:
        if part[0]:
            torch._foreach_copy_(*part)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(copy_part, parts))


def dumps(payload: dict[str, Any]) -> bytes:
    """The bytes of checkpoint.pth; CheckpointError if it holds what cannot be saved, or what loading would refuse."""
    file, leaves = io.BytesIO(), leaves_of(payload)
    _save(_put_together(leaves.frame, [owned(tensor) for tensor in leaves.tensors], leaves.numbers), file)
    data = file.getvalue()
    check_loadable(memoryview(data))
    return data


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """As a copy if it is part of a larger memory, since torch.save writes the whole of that."""
    part = tensor.layout is torch.strided and tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if part else tensor


def loads(data: memoryview, where: str, map_location: Any = "cpu") -> dict[str, Any]:
    """The payload whose checkpoint.pth is in memory; its tensors are copies. `where` is for messages."""
    return _load(cast(IO[bytes], MemoryFile(data)), where, map_location)


def check_loadable(data: memoryview) -> None:
    """CheckpointError if a checkpoint.pth holds objects that loading would refuse."""
    refused = torch.serialization.get_unsafe_globals_in_checkpoint(cast(IO[bytes], MemoryFile(data)))
    if refused:
        raise CheckpointError(
            f"the state holds objects of {', '.join(sorted(refused))}, which loading would refuse; "
            "keep tensors, numbers, strings, lists and dicts in it"
        )


def load_payload(storage: Storage, name: str, map_location: Any = "cpu") -> dict[str, Any]:
    """The payload of checkpoint `name`, read from the very file whose sha256 has just been checked."""
    manifest = read_manifest(storage, name)
    with (
        damage_named(storage.path_of(name)),
        storage.local_copy(f"{name}/{PAYLOAD}") as path,
        path.open("rb") as file,
    ):
        check_sha256(file, storage.path_of(name), PAYLOAD, manifest)
        file.seek(0)
        return _load(file, storage.path_of(f"{name}/{PAYLOAD}"), map_location)


def load_weights_file(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The dict in a bare .pth file of ours or of OpenPCDet: model_state, and what else was saved with it.

    A file of ours that still stands beside its manifest is checked against it. No code in the
    file is ever run; of OpenPCDet's, numpy scalars are let through.
    """
    path = expanded(path).absolute()
    if path.name == PAYLOAD and (path.parent / MANIFEST).exists():
        return load_payload(open_storage(str(path.parent.parent)), path.parent.name, map_location)
    try:
        with path.open("rb") as file:
            return _load(file, str(path), map_location)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


class NumberPlace(NamedTuple):
    """Where a number stands in the file, and how it is written there (of module struct)."""

    at: int
    form: str


class TensorPlace(NamedTuple):
    """Where a tensor's memory lies in the file, and which of the payload's tensors is the first to have it."""

    at: int
    first: int
    like: torch.Tensor

    def view(self, memory: memoryview) -> torch.Tensor:
        flat = torch.frombuffer(memory, dtype=self.like.dtype, count=self.like.numel(), offset=self.at)
        return flat.as_strided(self.like.shape, self.like.stride())


class OddPayload(Exception):  # noqa: N818 (nothing is wrong with it)
    """A payload that no blueprint can be made of."""


class _Skeleton:
    """What torch.save writes of a file to: the texts, and where in it the memory of tensors would stand."""

    def __init__(self) -> None:
        self.texts: list[tuple[int, bytes]] = []
        self.holes: list[tuple[int, int]] = []
        self.size_bytes = 0

    def write(self, data: Any) -> int:
        text = bytes(data)
        self.texts.append((self.size_bytes, text))
        self.size_bytes += len(text)
        return len(text)

    def seek(self, count: int, whence: int) -> None:
        assert whence == os.SEEK_CUR, "torch.serialization.skip_data goes forward"
        self.holes.append((self.size_bytes, count))
        self.size_bytes += count

    def flush(self) -> None:
        """Nothing is held back."""


class MemoryFile(io.RawIOBase):
    """Memory, to be read as a file."""

    def __init__(self, memory: memoryview) -> None:
        self._memory, self._at = memory, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, len(self._memory))[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._memory[self._at : self._at + len(buffer)]
        memoryview(buffer).cast("B")[: len(part)] = part
        self._at += len(part)
        return len(part)


def _save(payload: Any, file: Any) -> None:
    try:
        torch.save(payload, file)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise CheckpointError(f"the state cannot be saved: {error}") from error


def _saved(payload: Any) -> _Skeleton:
    file = _Skeleton()
    with torch.serialization.skip_data():
        _save(payload, file)
    return file


def _kinds_of(tensors: Sequence[torch.Tensor]) -> list[Any]:
    """What of them the file depends on besides their values; those that are one in memory are so in the file too."""
    seen: dict[Any, int] = {}
    kinds = []
    for index, tensor in enumerate(tensors):
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise OddPayload
        kind = (tensor.shape, tensor.stride(), tensor.dtype)
        memory = (tensor.data_ptr() or index, tensor.device, *kind)
        kinds.append((*kind, seen.setdefault(memory, index)))
    return kinds


def _stand_ins(tensors: Sequence[torch.Tensor], kinds: Sequence[Any]) -> list[torch.Tensor]:
    """Tensors like these on the host, each with memory of its own, which is never touched."""
    made: list[torch.Tensor] = []
    for tensor, (*_, first) in zip(tensors, kinds, strict=True):
        like = torch.empty_like(tensor.detach(), device="cpu") if first == len(made) else made[first]
        made.append(like)
    return made


def _marks_of(numbers: Sequence[int | float]) -> list[int | float]:
    """For each number another of its type that is written in as many bytes and found again."""
    floats = (struct.unpack(">d", struct.pack(">Q", FIRST_FLOAT + index))[0] for index in range(len(numbers)))
    return [
        FIRST_INT + index if type(number) is int else mark
        for index, (number, mark) in enumerate(zip(numbers, floats, strict=True))
    ]


def _places_of(marks: Sequence[int | float], file: _Skeleton) -> list[NumberPlace]:
    """Where the marks stand, in their order; fewer if one is not found exactly once (BININT, BINFLOAT of pickle)."""
    places: list[NumberPlace] = []
    if not marks:
        return places
    start, text = next(part for part in file.texts if part[1].startswith(PICKLED))  # data.pkl, in one piece
    for mark in marks:
        code, form = (b"J", "<i") if type(mark) is int else (b"G", ">d")
        word = code + struct.pack(form, mark)
        at = text.find(word)
        if at < 0 or text.find(word, at + 1) >= 0:
            break
        places.append(NumberPlace(start + at + 1, form))
    return places


def _tensor_places(stand_ins: Sequence[torch.Tensor], file: _Skeleton) -> list[TensorPlace]:
    firsts: dict[int, int] = {}
    for index, tensor in enumerate(stand_ins):
        if tensor.untyped_storage().nbytes():
            firsts.setdefault(id(tensor), index)
    sizes = [stand_ins[index].untyped_storage().nbytes() for index in firsts.values()]
    if sizes != [size for _, size in file.holes]:
        raise OddPayload  # more tensors are hidden in it
    return [
        TensorPlace(at, first, stand_ins[first].detach().to("meta"))
        for (at, _), first in zip(file.holes, firsts.values(), strict=True)
    ]


def _load(file: IO[bytes], path: str, map_location: Any) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_numpy_scalars()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what cannot be read is told below
            payload = torch.load(file, map_location=map_location, weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the bytes are anybody's: what reading them raises has no bounds
        refused = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", str(error))
        if refused:
            raise CheckpointError(
                f"{path}: refused, because loading it would call {refused[1]}; only tensors and plain values are loaded"
            ) from error
        said = str(error).rpartition("WeightsUnpickler error:")[2].strip()  # before it: how to load it unsafely
        what = (said or "it ends too early").splitlines()[0]
        raise CheckpointError(
            f"{path}: not a readable checkpoint: {type(error).__name__}: {what}. "
            "Give a file that torch.save wrote, whole; other pickles could run code and are not loaded"
        ) from error
    if not isinstance(payload, dict) or not isinstance(payload.get("model_state"), dict):
        found = f"the keys {list(payload)[:8]}" if isinstance(payload, dict) else f"a {type(payload).__name__}"
        raise CheckpointError(f"{path}: it should hold a dict with 'model_state', but holds {found}")
    return payload


def _numpy_scalars() -> list[Any]:
    """What unpickling a numpy number needs, under the names that numpy 1 and numpy 2 write."""
    scalar = np.float64(0).__reduce__()[0]
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
    kinds = [np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_]
    return [*((scalar, name) for name in names), np.dtype, *(type(np.dtype(kind)) for kind in kinds)]
