"""Pooling over cells, groups and neighbourhoods, against definitions written out in numpy."""

import numpy as np
import pytest
import torch
from point_sets import Kernel, point_sets

from raytrain.tasks.openpcdet.ops import bev_pool_ext, ingroup_inds_cuda, neighbours, torch_scatter
from raytrain.tasks.openpcdet.ops import pointnet2_stack_cuda as stack

SETS = {name: pair for name, pair in point_sets(60, 12).items() if name != "broken"}
every_set = pytest.mark.parametrize("points, places", SETS.values(), ids=SETS)


@pytest.fixture(params=["in one go", "in small chunks"])
def _chunks(request, monkeypatch):
    if request.param == "in small chunks":
        monkeypatch.setattr(neighbours, "PAIRS", 100)


def near(points, place, reach, ball):
    away = points.numpy() - place.numpy()
    if ball:
        return ((away**2).sum(1) <= np.float32(reach) ** 2).nonzero()[0], away
    return (np.abs(away) <= np.float32(reach)).all(1).nonzero()[0], away


@every_set
@pytest.mark.parametrize("limit", [-1, 4])
@pytest.mark.parametrize("ball", [0, 1])
@pytest.mark.usefixtures("_chunks")
def test_neighbours_are_listed_place_by_place_and_the_nearest_three_of_a_list_are_found(points, places, limit, ball):
    both, counts, asked = (
        torch.cat([points, points + 1]),
        torch.tensor([len(points)] * 2),
        torch.tensor([len(places)] * 2),
    )
    twice = places.repeat(2, 1)
    lists = [near(both[: len(points)], place, 2.0, ball)[0] for place in places]
    lists += [near(both[len(points) :], place, 2.0, ball)[0] + len(points) for place in places]
    lists = [each[:limit] if limit > 0 else each for each in lists]
    stacked, start_len = torch.zeros(5000, dtype=torch.int32), torch.zeros(len(twice), 2, dtype=torch.int32)
    cumsum = torch.zeros(1, dtype=torch.int32)
    stack.query_stacked_local_neighbor_idxs_wrapper_stack(
        both, counts, twice, asked, stacked, start_len, cumsum, 100, 2.0, limit, ball
    )
    assert int(cumsum) == sum(map(len, lists))
    for (start, length), wanted in zip(start_len.tolist(), lists, strict=True):
        assert stacked[start : start + length].tolist() == list(wanted)

    centres = twice[:, None] + torch.tensor([[0, 0, 0], [1, 0, 0.5]])  # two cells a place
    idx, dist2 = torch.full((len(twice), 2, 3), -1, dtype=torch.int32), torch.zeros(len(twice), 2, 3)
    stack.query_three_nn_by_stacked_local_idxs_wrapper_stack(
        both, twice, centres, idx, dist2, stacked[: int(cumsum)], start_len, len(twice), 2
    )
    for row, cell in np.ndindex(len(twice), 2):
        x, y, z = (centres[row, cell] - both[lists[row]]).numpy().T
        away = x * x + y * y + z * z
        order = np.argsort(away, kind="stable")[:3]
        order = [*order, *[order[0]] * (3 - len(order))] if len(order) else []
        assert idx[row, cell].tolist() == (list(lists[row][order]) if len(order) else [-1] * 3)
        assert dist2[row, cell].tolist() == (list(away[order]) if len(order) else [np.inf] * 3)


def test_a_list_that_does_not_fit_is_cut_and_its_length_told():
    points = torch.zeros(50, 3)
    stacked, start_len = torch.zeros(30, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32)
    cumsum = torch.zeros(1, dtype=torch.int32)
    stack.query_stacked_local_neighbor_idxs_wrapper_stack(
        points, torch.tensor([50]), points[:2], torch.tensor([2]), stacked, start_len, cumsum, 15, 1.0, -1, 1
    )
    assert int(cumsum) == 100 and stacked.tolist() == list(range(30))


@every_set
@pytest.mark.parametrize("first", [0, 1], ids=["sums", "the first"])
@pytest.mark.parametrize("limit", [-1, 3])
@pytest.mark.usefixtures("_chunks")
def test_features_are_pooled_in_a_grid_round_each_place(points, places, first, limit):
    grid, reach, cells = (2, 1, 3), 2.0, 6
    random = torch.Generator().manual_seed(0)
    features = torch.randn(len(points), 4, generator=random)
    sums, local = np.zeros((len(places), cells, 2)), np.zeros((len(places), cells, 3))
    counts, counted = np.zeros((len(places), cells), dtype=int), []
    for row, place in enumerate(places):
        inside, away = near(points, place, reach, ball=False)
        num_taken = 0
        for k in inside:
            at = np.floor((away[k] + np.float32(reach)) / np.float32(2 * reach / np.array(grid))).astype(int)
            cell = int(np.clip((at[0] * grid[1] + at[1]) * grid[2] + at[2], 0, cells - 1))
            if first and counts[row, cell]:
                continue
            counts[row, cell] += 1
            folded = features[k].numpy().reshape(2, 2)
            sums[row, cell] += folded[-1] if first else folded.sum(0)
            local[row, cell] += away[k]
            counted.append((k, row, cell))
            num_taken += 1
            if num_taken == limit:
                break
    new_features, new_local = torch.zeros(len(places), cells * 2), torch.zeros(len(places), cells * 3)
    cnt, grouped = torch.zeros(len(places), cells, dtype=torch.int32), torch.zeros(2000, 3, dtype=torch.int32)
    total = stack.vector_pool_wrapper(
        points, torch.tensor([len(points)]), features, places, torch.tensor([len(places)]), new_features, new_local,
        cnt, grouped, *grid, reach, 1, 2000, limit, 0, first,
    )  # fmt: skip
    assert sorted(map(tuple, grouped[:total].tolist())) == sorted(counted)
    assert (cnt.numpy() == counts).all()
    np.testing.assert_allclose(new_features.view(-1, cells, 2).numpy(), sums, atol=1e-4)
    np.testing.assert_allclose(new_local.view(-1, cells, 3).numpy(), local, atol=1e-4)


def test_the_gradient_of_vector_pooling_is_its_derivative():
    points, places = (part[:24].double() for part in SETS["scattered"])
    cnt, grouped = torch.zeros(len(places), 8, dtype=torch.int32), torch.zeros(600, 3, dtype=torch.int32)
    total = 0

    def forward(features):
        nonlocal total
        sums, local = features.new_zeros(len(places), 16), features.new_zeros(len(places), 24)
        total = stack.vector_pool_wrapper(
            points, torch.tensor([len(points)]), features, places, torch.tensor([len(places)]), sums, local,
            cnt.zero_(), grouped, 2, 2, 2, 2.5, 0, 600, -1, 0, 0,
        )  # fmt: skip
        return (sums.view(-1, 8, 2) / cnt.clamp(min=1)[:, :, None]).view(-1, 16)  # as pcdet divides what it gets

    def backward(grad):
        into = grad.new_zeros(len(points), 4)
        stack.vector_pool_grad_wrapper(grad, cnt, grouped[:total], into)
        return into

    features = torch.randn(len(points), 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Kernel.apply(x, forward, backward), (features,))


def test_camera_features_are_summed_in_the_cells_they_fall_into():
    random = torch.Generator().manual_seed(0)
    b, d, h, w = sizes = (2, 1, 3, 4)
    geometry = torch.stack([torch.randint(0, n, (40,), generator=random) for n in (h, w, d, b)], dim=1)
    rank = ((geometry[:, 3] * d + geometry[:, 2]) * h + geometry[:, 0]) * w + geometry[:, 1]
    geometry, rank = geometry[rank.argsort()].int(), rank.sort().values
    starts = torch.cat([torch.ones(1, dtype=torch.bool), rank[1:] != rank[:-1]]).nonzero()[:, 0].int()
    lengths = torch.diff(starts, append=torch.tensor([40])).int()
    x = torch.randn(40, 2, dtype=torch.double, generator=random, requires_grad=True)
    out = bev_pool_ext.bev_pool_forward(x.detach(), geometry, lengths, starts, *sizes)
    wanted = np.zeros((b, d, h, w, 2))
    for row, (of_h, of_w, of_d, of_b) in enumerate(geometry.tolist()):
        wanted[of_b, of_d, of_h, of_w] += x[row].detach().numpy()
    np.testing.assert_allclose(out.numpy(), wanted)
    forward = lambda x: bev_pool_ext.bev_pool_forward(x, geometry, lengths, starts, *sizes)  # noqa: E731
    backward = lambda grad: bev_pool_ext.bev_pool_backward(grad, geometry, lengths, starts, *sizes)  # noqa: E731
    assert torch.autograd.gradcheck(lambda x: Kernel.apply(x, forward, backward), (x,))


@pytest.mark.parametrize("groups", [[], [5], [2, 0, 2, 2, 7, 0], [1] * 20, list(range(10, 0, -1))])
def test_places_within_a_group_are_counted_in_order(groups):
    places = torch.full((len(groups),), -1)
    ingroup_inds_cuda.forward(torch.tensor(groups, dtype=torch.int64), places)
    assert places.tolist() == [groups[:at].count(group) for at, group in enumerate(groups)]


@pytest.mark.parametrize("dim_size", [None, 9])
@pytest.mark.parametrize("index", [[0], [3, 3, 3, 3], [0, 4, 1, 4, 0, 4], [2, 0, 1]], ids=str)
def test_groups_are_reduced_as_by_torch_scatter(index, dim_size):
    random = torch.Generator().manual_seed(0)
    src = torch.randn(len(index), 3, generator=random).round(decimals=0)  # with ties
    size, of = dim_size or max(index) + 1, torch.tensor(index)
    for group in range(size):
        rows = (of == group).nonzero()[:, 0]
        wanted = src[rows] if len(rows) else torch.zeros(1, 3)
        for name, reduced in (
            ("sum", wanted.sum(0)),
            ("mean", wanted.mean(0)),
            ("max", wanted.amax(0)),
            ("min", wanted.amin(0)),
        ):
            given = torch_scatter.scatter(src, of, dim=0, dim_size=dim_size, reduce=name)
            assert given.shape == (size, 3)
            torch.testing.assert_close(given[group], reduced)
        for function, place in ((torch_scatter.scatter_max, wanted.max(0)), (torch_scatter.scatter_min, wanted.min(0))):
            where = function(src, of, dim=0, dim_size=dim_size)[1][group]
            assert where.tolist() == (rows[place.indices].tolist() if len(rows) else [len(index)] * 3)
    transposed = torch_scatter.scatter_max(src.T.contiguous(), of, dim=-1, dim_size=dim_size)[0]
    assert torch.equal(transposed, torch_scatter.scatter_max(src, of, dim=0, dim_size=dim_size)[0].T)


def test_reductions_of_groups_write_into_what_they_are_given_and_take_nothing():
    src, index = torch.tensor([[1.0, -2], [3, 5]]), torch.tensor([1, 1])
    assert torch_scatter.scatter_add(src, index, 0, out=torch.ones(2, 2)).tolist() == [[1, 1], [5, 4]]
    value, where = torch_scatter.scatter_max(src, index, 0, out=torch.full((2, 2), 4.0))
    assert value.tolist() == [[4, 4], [4, 5]] and where.tolist() == [[2, 2], [2, 1]]
    for reduce in ("sum", "mean", "max", "min"):
        assert torch_scatter.scatter(src[:0], index[:0], 0, dim_size=3, reduce=reduce).tolist() == [[0, 0]] * 3
        assert torch_scatter.scatter(src[:0], index[:0], 0, reduce=reduce).shape == (0, 2)
    with pytest.raises(ValueError, match="one of sum"):
        torch_scatter.scatter(src, index, 0, reduce="median")


def test_reductions_of_groups_have_gradients():
    src = torch.randn(7, 2, dtype=torch.double, requires_grad=True)
    index = torch.tensor([0, 3, 3, 1, 0, 3, 1])
    for reduce in ("sum", "mean", "max", "min"):
        assert torch.autograd.gradcheck(lambda x, r=reduce: torch_scatter.scatter(x, index, 0, reduce=r), (src,))
    alike = torch.ones(3, 1, requires_grad=True)
    torch_scatter.scatter_max(alike, torch.tensor([0, 0, 0]), 0)[0].sum().backward()
    assert alike.grad.tolist() == [[1], [0], [0]]  # of equal ones the first, where amax would share it out
