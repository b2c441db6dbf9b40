"""Stacked batches: (N1 + N2 ..., C) rows of all samples one after the other, and how many each has."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def segments(*counts: Tensor) -> Iterator[tuple[slice, ...]]:
    """The slices of each sample in several stacked tensors, given each one's (batch_size,) counts of rows."""
    begins = [0] * len(counts)
    for sizes in zip(*(each.tolist() for each in counts), strict=True):
        ends = [begin + int(size) for begin, size in zip(begins, sizes, strict=True)]
        yield tuple(slice(begin, end) for begin, end in zip(begins, ends, strict=True))
        begins = ends


def begins_of(counts: Tensor) -> Tensor:
    """(batch_size,) -> (batch_size,): where each sample's rows begin."""
    return counts.cumsum(0) - counts
