"""Voxels: those of spconv, point for point."""

from pathlib import Path

import numpy as np
import pytest

from raytrain.tasks.pointpillars.voxels import Voxels

GOLDEN = Path(__file__).parents[2] / "golden" / "pointpillar" / "batch.npz"
RANGE = [0, -10.24, -3, 20.48, 10.24, 1]


def one_by_one(points, voxel_size, max_points, max_voxels):
    """The definition: a point goes to its voxel while that has room, a voxel is made while there is room for it."""
    low, size = np.float32(RANGE[:3]), np.float32(voxel_size)
    grid = np.round((np.array(RANGE[3:]) - RANGE[:3]) / voxel_size)
    voxels = {}
    for point in points:
        cell = np.floor((point[:3] - low) / size)
        z_y_x = tuple(cell[::-1].astype(int).tolist())
        if (cell < 0).any() or (cell >= grid).any() or (z_y_x not in voxels and len(voxels) == max_voxels):
            continue
        kept = voxels.setdefault(z_y_x, [])
        if len(kept) < max_points:
            kept.append(point)
    return voxels


def test_voxels_are_openpcdets_in_the_golden_batch():
    with np.load(GOLDEN) as golden:
        for frame in range(2):
            points = golden["points"][golden["points"][:, 0] == frame][:, 1:]
            of_frame = golden["voxel_coords"][:, 0] == frame
            voxels, coords, num_points = Voxels(RANGE, [0.32, 0.32, 4], 8, 2000)(points)
            assert np.array_equal(voxels, golden["voxels"][of_frame])
            assert np.array_equal(coords, golden["voxel_coords"][of_frame][:, 1:])
            assert np.array_equal(num_points, golden["voxel_num_points"][of_frame])


@pytest.mark.parametrize("max_voxels", [1, 300, 5000])
def test_voxels_come_as_their_first_points_do_and_keep_the_first_points_up_to_the_limits(max_voxels):
    points = np.random.RandomState(0).uniform([-1, -11, -4, 0], [22, 11, 2, 1], (3000, 4)).astype(np.float32)
    voxels, coords, num_points = Voxels(RANGE, [1.28, 0.64, 1], 3, max_voxels)(points)
    expected = one_by_one(points, [1.28, 0.64, 1], 3, max_voxels)
    assert [tuple(place) for place in coords.tolist()] == list(expected)
    assert (voxels.dtype, coords.dtype, num_points.dtype) == (np.float32, np.int32, np.int32)
    for voxel, count, kept in zip(voxels, num_points, expected.values(), strict=True):
        assert np.array_equal(voxel[:count], kept)
        assert not voxel[count:].any()


def test_more_voxels_than_16_bits_can_number_keep_their_order():
    x, y = np.meshgrid(np.arange(300), np.arange(300), indexing="ij")
    points = np.stack([x, y, 0 * x, x + y], axis=-1).reshape(-1, 4).astype(np.float32) + np.float32(0.5)
    points = np.concatenate([points, points])[np.random.RandomState(1).permutation(180_000)]
    voxels, coords, num_points = Voxels([0, 0, 0, 300, 300, 1], [1, 1, 1], 2, 100_000)(points)
    assert len(voxels) == 90_000 and (num_points == 2).all()
    assert np.array_equal(coords[:, :0:-1], np.floor(voxels[:, 0, :2]))
    assert np.array_equal(voxels[:, 0], voxels[:, 1])
    assert np.array_equal(voxels[0, 0], points[0])


@pytest.mark.parametrize("points", [np.zeros((0, 4)), np.full((5, 4), 99.0)])
def test_no_point_in_range_gives_no_voxel(points):
    voxels, coords, num_points = Voxels(RANGE, [0.32, 0.32, 4], 8, 2000)(points.astype(np.float32))
    assert (voxels.shape, coords.shape, num_points.shape) == ((0, 8, 4), (0, 3), (0,))


def test_the_upper_border_of_the_range_is_outside_and_the_lower_inside():
    points = np.array([[0, -10.24, -3, 0.1], [20.48, 0, 0, 0.2], [1, 10.24, 0, 0.3], [1, 0, 1, 0.4]], dtype=np.float32)
    _, coords, num_points = Voxels(RANGE, [0.32, 0.32, 4], 8, 2000)(points)
    assert (coords.tolist(), num_points.tolist()) == ([[0, 0, 0]], [1])
