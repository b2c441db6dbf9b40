"""Samples that a collate drops, seen by how long its batches are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from raytrain.batch import entries_of

ENOUGH = 3  # batches in which an entry is as long as there are samples: then it counts these
KEPT = 8  # short batches, until it is known what counts samples
LOOKED_AT = 1_000  # batches; each look takes 16 us on a busy core


class DroppedSamples:
    """Compares the lengths of what each batch holds with the number of samples that it is made of.

    What is never longer than that, and as long in some batches, counts samples. Where all that do so are shorter by the
    same, the collate has dropped samples (those that could not be loaded, most often). Points or boxes of all samples
    in one tensor are longer sooner or later. A list of images, which is as long as there are samples, speaks for the
    batch as well, and so does any other dimension: that of tokens by time, where samples come second. Of a long run the
    beginning is looked at.
    """

    def __init__(self) -> None:
        self._left = LOOKED_AT
        self._whole: Counter[str] = Counter()
        self._others: set[str] = set()
        self._short: list[tuple[int, dict[str, int]]] = []

    def see(self, num_samples: int, batch: Any) -> None:
        if self._left == 0:
            return
        self._left -= 1
        sizes = sizes_in(batch)
        lengths = {name: size[0] for name, size in sizes.items()}
        self._others.update(name for name, length in lengths.items() if length > num_samples)
        self._whole.update(name for name, length in lengths.items() if length == num_samples)
        if len(self._short) < KEPT and not any(num_samples in size for size in sizes.values()):
            self._short.append((num_samples, lengths))

    def described(self) -> str | None:
        """`7 of 8 samples (by the length of x and y)`, of the first such batch; None as long as there is none."""
        if not self._short:
            return None
        counting = [name for name, count in self._whole.items() if count >= ENOUGH and name not in self._others]
        for num_samples, lengths in self._short if counting else ():
            left = {lengths.get(name, -1) for name in counting}
            if len(left) == 1 and 0 <= min(left) < num_samples:
                return f"{min(left)} of {num_samples} samples (by the length of {' and '.join(counting[:2])})"
        return None


def sizes_in(batch: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that `batch` holds itself, and the length of each list and tuple."""
    entries = {"the batch": batch} if isinstance(batch, torch.Tensor) else entries_of(batch) or {}
    return {
        str(name): tuple(value.shape) if isinstance(value, torch.Tensor) else (len(value),)
        for name, value in entries.items()
        if isinstance(value, (list, tuple)) or (isinstance(value, torch.Tensor) and value.dim() > 0)
    }
