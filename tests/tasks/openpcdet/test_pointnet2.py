"""PointNet++'s operations against their definitions, written out in numpy, point by point."""

import numpy as np
import pytest
import torch
from point_sets import Kernel, point_sets

from raytrain.tasks.openpcdet.ops import neighbours
from raytrain.tasks.openpcdet.ops import pointnet2_batch_cuda as batch
from raytrain.tasks.openpcdet.ops import pointnet2_stack_cuda as stack

SETS = point_sets(90, 40)
every_set = pytest.mark.parametrize("points, places", SETS.values(), ids=SETS)


def squared(a, b):
    """(M, N) m^2, each in float32 in the kernels' order."""
    x, y, z = np.moveaxis(a.numpy()[:, None] - b.numpy()[None], 2, 0)
    return x * x + y * y + z * z


def first_near(points, places, radius, limit, untouched):
    """(M, limit): the definition of a ball query."""
    idx = np.full((len(places), limit), untouched)
    for row, near in enumerate(squared(places, points) < np.float32(radius) ** 2):
        near = near.nonzero()[0][:limit]
        if len(near):
            idx[row] = near[0]
            idx[row, : len(near)] = near
    return idx


def nearest_three(points, places):
    away = np.full((len(places), 3), np.inf, dtype=np.float32)
    idx = np.zeros((len(places), 3), dtype=np.int64)
    for row, all_away in enumerate(squared(places, points)):
        order = [k for k in np.argsort(all_away, kind="stable")[:3] if np.isfinite(all_away[k])]
        away[row, : len(order)], idx[row, : len(order)] = all_away[order], order
    return away, idx


def farthest(points, count):
    chosen, away = [0], np.full(len(points), 1e10, dtype=np.float32)
    while len(chosen) < count:
        away = np.minimum(away, squared(points[chosen[-1]][None], points)[0])
        chosen.append(int(away.argmax()))
    return chosen


@pytest.fixture(params=["in one go", "in small chunks"], autouse=True)
def _chunks(request, monkeypatch):
    if request.param == "in small chunks":
        monkeypatch.setattr(neighbours, "PAIRS", 200)
        monkeypatch.setattr(stack, "PAIRS", 200)


@every_set
@pytest.mark.parametrize("radius, limit", [(0.8, 4), (2.5, 16), (1.0, 1), (100.0, 8)])
def test_a_ball_query_gives_the_first_points_within_the_radius(points, places, radius, limit):
    idx = torch.full((2, len(places), limit), 7, dtype=torch.int32)
    twice = torch.stack([places, places]), torch.stack([points, points.flip(0)])
    batch.ball_query_wrapper(2, len(points), len(places), radius, limit, *twice, idx)
    assert (idx[0].numpy() == first_near(points, places, radius, limit, 7)).all()
    assert (idx[1].numpy() == first_near(points.flip(0), places, radius, limit, 7)).all()


@every_set
def test_a_stacked_ball_query_stays_within_its_sample(points, places):
    counts, asked = torch.tensor([len(points), 0, len(points)]), torch.tensor([len(places), len(places), len(places)])
    idx = torch.zeros(3 * len(places), 5, dtype=torch.int32)
    stack.ball_query_wrapper(3, len(idx), 1.5, 5, places.repeat(3, 1), asked, points.repeat(2, 1), counts, idx)
    wanted = first_near(points, places, 1.5, 5, 0)
    wanted[~(squared(places, points) < 1.5**2).any(1), 0] = -1
    nothing = np.zeros_like(wanted)
    nothing[:, 0] = -1
    assert (idx.numpy() == np.concatenate([wanted, nothing, wanted])).all()


@every_set
def test_the_three_nearest_points_are_found_in_order(points, places):
    dist2, idx = torch.zeros(1, len(places), 3), torch.zeros(1, len(places), 3, dtype=torch.int32)
    batch.three_nn_wrapper(1, len(places), len(points), places[None], points[None], dist2, idx)
    away, wanted = nearest_three(points, places)
    assert (dist2[0].numpy() == away).all()
    assert (idx[0].numpy() == wanted).all()

    dist2, idx = torch.zeros(2 * len(places), 3), torch.zeros(2 * len(places), 3, dtype=torch.int32)
    counts, asked = torch.tensor([len(points)] * 2), torch.tensor([len(places)] * 2)
    stack.three_nn_wrapper(places.repeat(2, 1), asked, points.repeat(2, 1), counts, dist2, idx)
    assert (dist2.numpy() == np.concatenate([away, away])).all()
    assert (idx.numpy() == np.concatenate([wanted, wanted + len(points)])).all()


@pytest.mark.parametrize("name", [name for name in SETS if name not in ("broken", "empty")])
def test_farthest_points_are_each_as_far_as_can_be_from_those_before(name):
    points, _ = SETS[name]
    idx, temp = torch.zeros(1, 20, dtype=torch.int32), torch.full((1, len(points)), 1e10)
    batch.farthest_point_sampling_wrapper(1, len(points), 20, points[None].contiguous(), temp, idx)
    assert idx[0].tolist() == farthest(points, 20)

    both, counts = torch.cat([points, points.flip(0)]), torch.tensor([len(points)] * 2)
    idx, temp = torch.zeros(25, dtype=torch.int32), torch.full((len(both),), 1e10)
    stack.stack_farthest_point_sampling_wrapper(both, temp, counts, idx, torch.tensor([20, 5]))
    assert idx.tolist() == farthest(points, 20) + [k + len(points) for k in farthest(points.flip(0), 5)]


def test_features_are_gathered_grouped_and_interpolated():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 9, generator=random)
    idx = torch.randint(0, 9, (2, 4, 5), generator=random).int()
    out = torch.empty(2, 3, 4, 5)
    batch.group_points_wrapper(2, 3, 9, 4, 5, features, idx, out)
    assert all(torch.equal(out[b, :, m, k], features[b, :, idx[b, m, k]]) for b, m, k in np.ndindex(*idx.shape))
    gathered = torch.empty(2, 3, 4)
    batch.gather_points_wrapper(2, 3, 9, 4, features, idx[..., 0].contiguous(), gathered)
    assert torch.equal(gathered, out[..., 0])
    weight = torch.rand(2, 4, 3, generator=random)
    blended = torch.empty(2, 3, 4)
    batch.three_interpolate_wrapper(2, 3, 9, 4, features, idx[..., :3].contiguous(), weight, blended)
    torch.testing.assert_close(blended, (out[..., :3] * weight[:, None]).sum(3))

    flat, counts, asked = features.transpose(1, 2).flatten(0, 1), torch.tensor([9, 0, 9]), torch.tensor([4, 0, 4])
    grouped = torch.empty(8, 3, 5)
    stack.group_points_wrapper(3, 8, 3, 5, flat, counts, idx.flatten(0, 1), asked, grouped)
    assert torch.equal(grouped, out.transpose(1, 2).flatten(0, 1))
    blended = torch.empty(4, 3)
    stack.three_interpolate_wrapper(flat, idx[0, :, :3], weight[0], blended)
    torch.testing.assert_close(blended, (flat[idx[0, :, :3].long()] * weight[0, :, :, None]).sum(1))


def test_backward_kernels_are_the_derivatives_of_the_forward_ones():
    random = torch.Generator().manual_seed(0)
    idx = torch.randint(0, 6, (2, 3, 3), generator=random).int()  # points that are asked for twice, and never
    weight = torch.rand(2, 3, 3, generator=random, dtype=torch.double)
    counts, asked = torch.tensor([6, 6]), torch.tensor([3, 3])

    def kernel(shape, name_and_sizes, module, grad_name_and_sizes, before, after, grad_shape):
        def forward(x):
            out = x.new_empty(shape)
            getattr(module, name_and_sizes[0])(*name_and_sizes[1:], x, *before, out)
            return out

        def backward(grad):
            into = grad.new_zeros(grad_shape)
            getattr(module, grad_name_and_sizes[0])(*grad_name_and_sizes[1:], grad, *after, into)
            return into

        return forward, backward

    stacked = (12, 2)
    flat = idx.flatten(0, 1)
    cases = [
        ((2, 2, 6), kernel((2, 2, 3, 3), ("group_points_wrapper", 2, 2, 6, 3, 3), batch,
                           ("group_points_grad_wrapper", 2, 2, 6, 3, 3), (idx,), (idx,), (2, 2, 6))),
        ((2, 2, 6), kernel((2, 2, 3), ("gather_points_wrapper", 2, 2, 6, 3), batch,
                           ("gather_points_grad_wrapper", 2, 2, 6, 3), (idx[..., 0],), (idx[..., 0],), (2, 2, 6))),
        ((2, 2, 6), kernel((2, 2, 3), ("three_interpolate_wrapper", 2, 2, 6, 3), batch,
                           ("three_interpolate_grad_wrapper", 2, 2, 3, 6), (idx, weight), (idx, weight), (2, 2, 6))),
        (stacked, kernel((6, 2, 3), ("group_points_wrapper", 2, 6, 2, 3), stack,
                         ("group_points_grad_wrapper", 2, 6, 2, 12, 3), (counts, flat, asked), (flat, asked, counts),
                         stacked)),
        (stacked, kernel((6, 2), ("three_interpolate_wrapper",), stack, ("three_interpolate_grad_wrapper",),
                         (flat, weight.flatten(0, 1)), (flat, weight.flatten(0, 1)), stacked)),
    ]  # fmt: skip
    for shape, (forward, backward) in cases:
        x = torch.randn(shape, generator=random, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, f=forward, b=backward: Kernel.apply(x, f, b), (x,))


@pytest.mark.parametrize("limit", [1, 3, 40])
@pytest.mark.parametrize("radius", [0.5, 1.7, 50.0])
def test_a_voxel_query_gives_the_first_points_in_the_voxels_round_a_place(radius, limit):
    random = np.random.default_rng(0)
    shape, reach = (2, 4, 5, 6), (1, 2, 1)
    table = np.where(random.random(shape) < 0.4, random.integers(0, 50, shape), -1).astype(np.int32)
    xyz = random.uniform(0, 5, (50, 3)).astype(np.float32)
    places = random.uniform(0, 5, (30, 3)).astype(np.float32)
    coords = np.column_stack([random.integers(0, size, 30) for size in shape]).astype(np.int32)
    wanted = np.zeros((30, limit), dtype=np.int32)
    for row, (b, *at) in enumerate(coords):
        near = []
        for step in np.ndindex(*(2 * r + 1 for r in reach)):
            cell = np.array(at) + step - reach
            if (cell >= 0).all() and (cell < shape[1:]).all() and (point := table[(b, *cell)]) >= 0:
                x, y, z = xyz[point] - places[row]
                near += [point] if x * x + y * y + z * z <= np.float32(radius) ** 2 else []
        near = near[:limit]
        wanted[row] = near[0] if near else 0
        wanted[row, : len(near)] = near
        wanted[row, 0] = near[0] if near else -1
    idx = torch.zeros(30, limit, dtype=torch.int32)
    tensors = [torch.from_numpy(each) for each in (places, xyz, coords, table)]
    stack.voxel_query_wrapper(30, *shape[1:], limit, radius, *reach, *tensors, idx)
    assert (idx.numpy() == wanted).all()
