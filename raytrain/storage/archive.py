"""A checkpoint.pth in memory, seen as what it is: a zip file whose parts are stored as they are."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from typing import IO, Any, cast

from raytrain.errors import CheckpointError

LOCAL_HEADER = struct.Struct("<26xHH")  # of a part, before its name and what is added to it: how long these two are


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


class Archive:
    """The parts of what torch.save wrote, without a copy of them."""

    def __init__(self, memory: memoryview) -> None:
        """CheckpointError if it is no such file."""
        self._memory = memory
        try:
            with zipfile.ZipFile(cast(IO[bytes], MemoryFile(memory))) as file:
                parts = file.infolist()
        except (zipfile.BadZipFile, struct.error, NotImplementedError, ValueError, OSError) as error:
            raise CheckpointError(f"it is no archive of torch.save: {error}") from error
        # Each below one folder, which has the name that the file was saved under.
        self._parts = {info.filename.partition("/")[2]: info for info in parts}

    def part(self, name: str) -> memoryview:
        """The bytes of one part: "data.pkl", "data/0"."""
        info = self._parts.get(name)
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"it is no archive of torch.save: it has no plain part {name}")
        header = self._memory[info.header_offset : info.header_offset + LOCAL_HEADER.size]
        if len(header) < LOCAL_HEADER.size:
            raise CheckpointError(f"it ends before its part {name}")
        start = info.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header))
        part = self._memory[start : start + info.file_size]
        if len(part) < info.file_size:
            raise CheckpointError(f"it ends within its part {name}")
        return part
