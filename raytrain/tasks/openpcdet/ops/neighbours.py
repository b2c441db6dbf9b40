"""Which points lie near which places: looked up in a grid of cells, so that few of all pairs are measured.

Plain torch on any device. Points that are not finite are near nothing, as comparisons in a kernel would have it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

PAIRS = 1 << 21  # pairs at a time: some 100 MB with all that is computed of them
CELLS = 1 << 20  # the most cells: the grid is coarser where a reach of centimetres meets a field of kilometres


def near_pairs(points: Tensor, places: Tensor, reach: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Every pair that may be within `reach` in each coordinate, and some further apart, in chunks of whole places.

    points: (N, D), places: (M, D), metres.   Yields (P,) row numbers of places, rising, and (P,) of points, int64.
    """
    points, places = points.detach().double(), places.detach().double()
    usable = points.isfinite().all(1).nonzero().squeeze(1)  # (N',)
    asked = places.isfinite().all(1).nonzero().squeeze(1)  # (M',)
    if not len(usable) or not len(asked):
        return
    grid = _Grid.over(points[usable], reach)
    order, starts = grid.sorted(points[usable])
    first, last = grid.runs(places[asked], starts)  # (M', R): of the sorted points, one run for each row of cells
    counts = last - first
    for some in _chunks(counts.sum(1)):
        lengths, begins = counts[some].flatten(), first[some].flatten()
        ends = lengths.cumsum(0)
        within = torch.arange(int(ends[-1]), device=points.device)
        within += torch.repeat_interleave(begins - ends + lengths, lengths)
        rows = torch.repeat_interleave(asked[some], counts[some].sum(1))
        yield rows, usable[order[within]]


class _Grid:
    """Cells at least as wide as a reach, two rings of empty ones about them, so that no neighbour wraps around."""

    def __init__(self, low: Tensor, size: float, shape: Tensor) -> None:
        self.low, self.size, self.shape = low, size, shape
        self.strides = shape.flip(0).cumprod(0).flip(0) // shape  # (D,), the last coordinate's cells in a row

    @classmethod
    def over(cls, points: Tensor, reach: float) -> _Grid:
        low = points.amin(0)
        extent = points.amax(0) - low
        size = max(reach * 1.001, float(extent.amax()) / CELLS, 1e-9)  # rounding never hides one at the very reach
        while (shape := (extent / size).long() + 5).double().prod() > CELLS:
            size *= 1.3
        return cls(low, size, shape)

    def sorted(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Row numbers of the points by cell (those of a cell in order), and where each cell's begin: (cells + 1,)."""
        key = ((((points - self.low) / self.size).long() + 2) * self.strides).sum(1)
        counts = torch.bincount(key, minlength=int(self.shape.prod()))
        return key.argsort(stable=True), torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def runs(self, places: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Begin and end among the sorted points of what lies in the cells round each place, (M, 3 ** (D - 1)) each."""
        cells = ((places - self.low) / self.size).floor().clamp(min=-1).long() + 2  # beyond the points: their rim
        key = (torch.minimum(cells, self.shape - 2) * self.strides).sum(1)
        steps = itertools.product((-1, 0, 1), repeat=len(self.strides) - 1)
        offsets = (self.strides.new_tensor(list(steps)).view(-1, len(self.strides) - 1) * self.strides[:-1]).sum(1)
        middle = key[:, None] + offsets  # (M, R)
        return starts[middle - 1], starts[middle + 2]


def _chunks(counts: Tensor) -> Iterator[slice]:
    """Slices of rows whose counts add up to at most PAIRS, or of one row."""
    total = counts.cumsum(0)
    begin = 0
    while begin < len(counts):
        passed = int(total[begin - 1]) if begin else 0
        end = int(torch.searchsorted(total, passed + PAIRS, right=True))
        end = max(end, begin + 1)
        if int(total[end - 1]) > passed:  # rows without any neighbour need no work
            yield slice(begin, end)
        begin = end


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """m^2 between the two points of each pair, summed x, y, z as the kernels do.   a, b: (P, 3).   Returns (P,)."""
    x, y, z = (a - b).unbind(1)
    return x * x + y * y + z * z


def firsts(rows: Tensor, columns: Tensor, num_columns: int, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the pairs of each row the `limit` with the lowest column (all where it is < 1), and their ranks from 0.

    rows, columns: (P,) int64 in any order.   Returns rows, columns and ranks (P',), sorted by row, then column.
    """
    key = (rows * num_columns + columns).sort(stable=True).values  # torch's stable sort is three times as fast
    rows, columns = key // num_columns, key % num_columns
    ranks = ranks_of_sorted(rows)
    if limit < 1:
        return rows, columns, ranks
    kept = ranks < limit
    return rows[kept], columns[kept], ranks[kept]


def ranks_of_sorted(groups: Tensor) -> Tensor:
    """How many of the same group stand before each: (P,) sorted -> (P,) int64 from 0."""
    places = torch.arange(len(groups), device=groups.device)
    if not len(groups):
        return places
    begins = torch.ones_like(groups, dtype=torch.bool)
    begins[1:] = groups[1:] != groups[:-1]
    return places - places[begins].repeat_interleave(torch.diff(begins.nonzero().squeeze(1), append=places[-1:] + 1))


def ball(points: Tensor, places: Tensor, radius: float, limit: int) -> tuple[Tensor, Tensor]:
    """The first `limit` points nearer than `radius` to each place, and how many of these there are.

    points: (N, 3), places: (M, 3).   Returns (M, limit) int64, filled up with the first, and (M,) int64.
    """
    chosen = torch.zeros(len(places), limit, dtype=torch.int64, device=points.device)
    found = torch.zeros(len(places), dtype=torch.int64, device=points.device)
    squared = points.new_tensor(radius) ** 2  # rounded as the kernel's float is
    for rows, columns in near_pairs(points, places, radius):
        near = squared_distances(places[rows], points[columns]) < squared
        rows, columns, ranks = firsts(rows[near], columns[near], len(points), limit)
        first = ranks == 0
        chosen[rows[first]] = columns[first][:, None]
        chosen[rows, ranks] = columns
        found.scatter_add_(0, rows, torch.ones_like(rows))
    return chosen, found


def three_nearest(points: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The three points nearest to each place, the nearest first, of equally far ones the first.

    points: (N, 3), places: (M, 3).   Returns m^2 and row numbers, (M, 3) each; inf and 0 where there are fewer.

    Within a reach that is doubled until a place has three: all that is nearer was then looked at.
    """
    squared = places.new_full((len(places), 3), torch.inf)
    chosen = torch.zeros(len(places), 3, dtype=torch.int64, device=places.device)
    waiting = torch.arange(len(places), device=places.device)
    reach = _likely_reach(points, places)
    while len(waiting):
        everything = len(waiting) * len(points) <= PAIRS or not reach < 1e6
        asked = places[waiting]
        for rows, columns in _all_pairs(points, asked) if everything else near_pairs(points, asked, reach):
            distances = squared_distances(asked[rows], points[columns])
            near = distances < (torch.inf if everything else reach**2)
            order, ranks = _nearest(rows[near], columns[near], distances[near], len(points))
            of = waiting[rows[near][order]]
            squared[of, ranks], chosen[of, ranks] = distances[near][order], columns[near][order]
        if everything:
            break
        waiting = waiting[squared[waiting, 2] == torch.inf]
        reach *= 2
    return squared, chosen.masked_fill(squared == torch.inf, 0)


def _nearest(rows: Tensor, columns: Tensor, distances: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Which pairs (P,) are of the three nearest of their row, and their ranks; of equal distances the first column."""
    order = (rows * num_columns + columns).sort(stable=True).indices
    order = order[distances[order].sort(stable=True).indices]
    order = order[rows[order].sort(stable=True).indices]
    ranks = ranks_of_sorted(rows[order])
    return order[ranks < 3], ranks[ranks < 3]


def _likely_reach(points: Tensor, places: Tensor) -> float:
    """Metres within which most places have three points, by the looks of 64 places; inf where there are not three."""
    if len(points) < 3 or not len(places):
        return torch.inf
    some = places[:: max(1, len(places) // 64)].detach().double()
    third = torch.cdist(some, points.detach().double()).topk(3, largest=False).values[:, 2]
    third = third[third.isfinite()]
    return 1.5 * float(third.median()) + 1e-6 if len(third) else torch.inf


def _all_pairs(points: Tensor, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of places and of points, (P,) each, of all pairs, in chunks of whole places."""
    every = torch.arange(len(points), device=points.device)
    for rows in torch.arange(len(places), device=points.device).split(max(1, PAIRS // max(1, len(points)))):
        yield rows.repeat_interleave(len(points)), every.repeat(len(rows))
