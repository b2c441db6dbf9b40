"""Where in a checkpoint.pth each tensor and number stands, so that the same file with other values is a few copies.

A state is saved often and its shape hardly ever changes: a FileLayout keeps all of the file but the values of its
tensors and numbers, and a FileBuffer is such a file in memory.
"""

from __future__ import annotations

import copy
import os
import pickle
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from raytrain.errors import CheckpointError

LARGE_BYTES = 32 << 20  # of a state that several threads copy
COPIERS = 4  # at most
INT32 = range(-(2**31), 2**31)
PICKLED = b"\x80\x02"  # how a pickle of torch.save begins
FIRST_INT, FIRST_FLOAT = 0x5A3C0000, 0x43E5A3C900000000  # stand for the numbers of a payload while it is laid out


class Leaves(NamedTuple):
    """A payload taken apart: its tensors and numbers in their order, and all that holds them together."""

    tensors: list[torch.Tensor]
    numbers: list[int | float]
    structure: list[Any]


def leaves_of(payload: dict[str, Any]) -> Leaves:
    leaves = Leaves([], [], [])
    _take_apart(payload, leaves)
    return leaves


def _take_apart(value: Any, leaves: Leaves) -> None:
    kind = type(value)
    if kind is dict:
        leaves.structure.append((kind, len(value)))
        for key, each in value.items():
            leaves.structure.append(key)
            _take_apart(each, leaves)
    elif kind is list or kind is tuple:
        leaves.structure.append((kind, len(value)))
        for each in value:
            _take_apart(each, leaves)
    elif isinstance(value, torch.Tensor):
        leaves.tensors.append(value)
        leaves.structure.append(torch.Tensor)
    elif kind is float or (kind is int and value in INT32):
        leaves.numbers.append(value)
        leaves.structure.append(kind)
    else:
        leaves.structure.append(value)


def put_together(structure: list[Any], tensors: Sequence[Any], numbers: Sequence[Any]) -> Any:
    """The payload whose leaves these are."""
    parts, tensors_left, numbers_left = iter(structure), iter(tensors), iter(numbers)

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


class FileLayout:
    """checkpoint.pth of all payloads that differ from one in the values of their tensors and numbers alone.

    size_bytes: of the file
    """

    def __init__(self, leaves: Leaves) -> None:
        """IrregularPayload if there are tensors where nothing but values is expected."""
        self._kinds = _kinds_of(leaves.tensors)
        placeholders, marks = _placeholder_tensors(leaves.tensors, self._kinds), _placeholder_numbers(leaves.numbers)
        file = _saved(put_together(leaves.structure, placeholders, marks))
        self._places = _places_of(marks, file)
        self._fixed_numbers: list[int | float] = []
        if len(self._places) < len(marks):  # some cannot be told apart in there: it is good for these numbers only
            self._places, self._fixed_numbers = [], leaves.numbers
            file = _saved(put_together(leaves.structure, placeholders, leaves.numbers))
        self._texts, self.size_bytes = file.texts, file.size_bytes
        self._tensors = _tensor_places(placeholders, file)
        try:  # a Counter, a set that the model goes on to change would always be equal to itself
            self._structure = copy.deepcopy(leaves.structure)
        except Exception as error:  # anybody's objects
            raise IrregularPayload from error

    def fits(self, leaves: Leaves) -> bool:
        """Whether it is the layout of this payload too."""
        try:
            same = leaves.structure == self._structure
        except (ValueError, RuntimeError):  # arrays do not say whether they are equal
            return False
        numbers_fit = not self._fixed_numbers or self._fixed_numbers == leaves.numbers
        return same and numbers_fit and _kinds_of(leaves.tensors) == self._kinds

    def write_into(self, memory: memoryview) -> FileBuffer:
        """`memory` (size_bytes of it) with all written there that does not change."""
        for at, text in self._texts:
            memory[at : at + len(text)] = text
        return FileBuffer(memory, self._tensors, self._places)


class FileBuffer:
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


class IrregularPayload(Exception):  # noqa: N818 (nothing is wrong with it)
    """A payload that no layout can be made of."""


class _FileRecorder:
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


def save(payload: Any, file: Any) -> None:
    try:
        torch.save(payload, file)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise CheckpointError(f"the state cannot be saved: {error}") from error


def _saved(payload: Any) -> _FileRecorder:
    file = _FileRecorder()
    with torch.serialization.skip_data():
        save(payload, file)
    return file


def _kinds_of(tensors: Sequence[torch.Tensor]) -> list[Any]:
    """What of them the file depends on besides their values; those that are one in memory are so in the file too."""
    seen: dict[Any, int] = {}
    kinds = []
    for index, tensor in enumerate(tensors):
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise IrregularPayload
        kind = (tensor.shape, tensor.stride(), tensor.dtype)
        memory = (tensor.data_ptr() or index, tensor.device, *kind)
        kinds.append((*kind, seen.setdefault(memory, index)))
    return kinds


def _placeholder_tensors(tensors: Sequence[torch.Tensor], kinds: Sequence[Any]) -> list[torch.Tensor]:
    """Tensors like these on the host, each with memory of its own, which is never touched."""
    made: list[torch.Tensor] = []
    for tensor, (*_, first) in zip(tensors, kinds, strict=True):
        like = torch.empty_like(tensor.detach(), device="cpu") if first == len(made) else made[first]
        made.append(like)
    return made


def _placeholder_numbers(numbers: Sequence[int | float]) -> list[int | float]:
    """For each number another of its type that is written in as many bytes and found again."""
    floats = (struct.unpack(">d", struct.pack(">Q", FIRST_FLOAT + index))[0] for index in range(len(numbers)))
    return [
        FIRST_INT + index if type(number) is int else mark
        for index, (number, mark) in enumerate(zip(numbers, floats, strict=True))
    ]


def _places_of(marks: Sequence[int | float], file: _FileRecorder) -> list[NumberPlace]:
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


def _tensor_places(placeholders: Sequence[torch.Tensor], file: _FileRecorder) -> list[TensorPlace]:
    firsts: dict[int, int] = {}
    for index, tensor in enumerate(placeholders):
        if tensor.untyped_storage().nbytes():
            firsts.setdefault(id(tensor), index)
    sizes = [placeholders[index].untyped_storage().nbytes() for index in firsts.values()]
    if sizes != [size for _, size in file.holes]:
        raise IrregularPayload  # more tensors are hidden in it
    return [
        TensorPlace(at, first, placeholders[first].detach().to("meta"))
        for (at, _), first in zip(file.holes, firsts.values(), strict=True)
    ]
