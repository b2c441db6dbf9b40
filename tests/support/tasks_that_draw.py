"""Tasks with pictures: good ones, and what may be wrong with one."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import bad_tasks

from raytrain.errors import TaskError


def png(grey: int) -> bytes:
    """An image of 3 x 2 grey pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(2 * bytes([0, grey, grey, grey]))
    header = struct.pack(">IIBBBBB", 3, 2, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


class Drawing(bad_tasks.Good):
    """A picture is as grey as there are predictions; its name has the sample's number."""

    def pictures(self, predictions: list[Any], dataset: Any, count: int) -> Iterator[tuple[str, bytes]]:
        for index in range(count):
            dataset[index]
            yield f"sample_{index}", png(len(predictions))


class Raises(bad_tasks.Good):
    def pictures(self, predictions: list[Any], dataset: Any, count: int) -> Iterator[tuple[str, bytes]]:
        yield "first", png(0)
        raise ZeroDivisionError("no width")


class Lacking(bad_tasks.Good):
    def pictures(self, predictions: list[Any], dataset: Any, count: int) -> Iterator[tuple[str, bytes]]:
        raise TaskError('get it with: pip install "raytrain[pictures]"')
        yield


class Endless(bad_tasks.Good):
    def pictures(self, predictions: list[Any], dataset: Any, count: int) -> Iterator[tuple[str, bytes]]:
        for index in itertools.count():
            yield f"again_{index}", png(1)
