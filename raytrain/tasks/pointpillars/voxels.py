"""Points into voxels, as spconv's Point2VoxelCPU3d does for OpenPCDet, in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Voxels:
    """The voxels of a point cloud, in the order in which their first points come.

    point_cloud_range: x y z of the lowest corner, x y z of the highest, metres
    voxel_size:        x y z, metres
    max_points:        of those that fall in a voxel the first so many are kept
    max_voxels:        of the voxels with points in them likewise
    """

    def __init__(
        self, point_cloud_range: Sequence[float], voxel_size: Sequence[float], max_points: int, max_voxels: int
    ) -> None:
        span = np.array(point_cloud_range[3:]) - np.array(point_cloud_range[:3])
        self.grid: tuple[int, int, int] = tuple(np.round(span / np.array(voxel_size)).astype(int).tolist())  # x y z
        self.low = np.array(point_cloud_range[:3], dtype=np.float32)
        self.size = np.array(voxel_size, dtype=np.float32)
        self.max_points, self.max_voxels = max_points, max_voxels

    def __call__(self, points: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]:
        """points (N, C): voxels (V, P, C) filled up with zeros, their z y x (V, 3), and their points (V,)."""
        inside, cells = self._cells(points)
        ids, firsts = first_appearances(cells, self.grid[0] * self.grid[1] * self.grid[2])
        if len(firsts) > self.max_voxels:
            firsts = firsts[: self.max_voxels]
            kept = ids < self.max_voxels
            inside, ids = inside[kept], ids[kept]
        slots, order, counts = slots_of(ids, len(firsts))
        kept = slots < self.max_points
        voxels = np.zeros((len(firsts) * self.max_points, points.shape[1]), dtype=np.float32)
        voxels[ids[order[kept]] * self.max_points + slots[kept]] = points[inside[order[kept]]]
        z, rest = np.divmod(cells[firsts], self.grid[0] * self.grid[1])
        coords = np.stack([z, *np.divmod(rest, self.grid[0])], axis=1).astype(np.int32)
        num_points = np.minimum(counts, self.max_points).astype(np.int32)
        return voxels.reshape(len(firsts), self.max_points, points.shape[1]), coords, num_points

    def _cells(self, points: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which points are in the range, (n,), and the cells that those are in: (z * ny + y) * nx + x, (n,).

        float32 throughout, as in spconv: a point on the border of two cells then falls on the same side.
        """
        axes = [np.floor((points[:, axis] - self.low[axis]) / self.size[axis]) for axis in range(3)]
        held = [(cell >= 0) & (cell < count) for cell, count in zip(axes, self.grid, strict=True)]
        inside = np.flatnonzero(held[0] & held[1] & held[2])
        x, y, z = (cell[inside].astype(np.int64) for cell in axes)
        return inside, (z * self.grid[1] + y) * self.grid[0] + x


def first_appearances(cells: NDArray[np.int64], num_cells: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """cells (n,): each one's number in the order of first appearance, (n,), and where those are, (V,).

    Without a sort: each cell of a table, which need not be cleared, is told where it comes first.
    """
    places = np.arange(len(cells))
    table = np.empty(num_cells, dtype=np.int32)
    table[cells[::-1]] = places[::-1]  # of several values for one cell numpy keeps the last
    first = table[cells]
    comes_first = first == places
    numbers = np.cumsum(comes_first) - 1
    return numbers[first], np.flatnonzero(comes_first)


def slots_of(ids: NDArray[np.int64], num_ids: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """ids (n,), each of 0..num_ids - 1 among them: (slots, order, counts).

    order:  (n,) by id, equal ids as they come
    slots:  (n,) how many of the same id come before ids[order]
    counts: (num_ids,) of each id
    """
    narrow = ids.astype(np.uint16) if num_ids <= 1 << 16 else ids  # numpy sorts 16 bits by counting
    order = np.argsort(narrow, kind="stable")
    counts = np.bincount(ids, minlength=num_ids)
    starts = np.cumsum(counts) - counts
    return np.arange(len(ids)) - np.repeat(starts, counts), order, counts
