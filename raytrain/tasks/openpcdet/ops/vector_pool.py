"""PV-RCNN++'s vector pooling: the neighbourhood of each place cut into a grid of cells, features pooled in each."""

from __future__ import annotations

import torch
from torch import Tensor

from raytrain.tasks.openpcdet.ops.neighbours import PAIRS, firsts, near_pairs, ranks_of_sorted
from raytrain.tasks.openpcdet.ops.segments import segments

BALL = 1  # of neighbor_type: any other is a cube
MOST_NEIGHBOURS = 1000  # of one place: the kernel's room


def query_stacked_local_neighbor_idxs_wrapper_stack(
    support_xyz: Tensor,
    xyz_batch_cnt: Tensor,
    new_xyz: Tensor,
    new_xyz_batch_cnt: Tensor,
    stack_neighbor_idxs: Tensor,
    start_len: Tensor,
    cumsum: Tensor,
    avg_length_of_neighbor_idxs: int,
    max_neighbour_distance: float,
    nsample: int,
    neighbor_type: int,
) -> int:
    """Lists of the points near each place, one after the other.

    support_xyz: (N1 + N2 ..., 3), new_xyz: (M1 + M2 ..., 3).   Written: stack_neighbor_idxs (L,), rows of support_xyz,
    cut off at its length; start_len (M1 + M2 ..., 2), where each list begins and how long it is; cumsum (1,), the
    length of all, which may be more than fits.
    """
    limit = nsample if 0 < nsample < MOST_NEIGHBOURS else MOST_NEIGHBOURS
    rows, columns = _neighbours(
        support_xyz, xyz_batch_cnt, new_xyz, new_xyz_batch_cnt, max_neighbour_distance, limit, neighbor_type
    )
    counts = torch.bincount(rows, minlength=len(new_xyz))
    start_len.copy_(torch.stack([counts.cumsum(0) - counts, counts], dim=1))
    cumsum += len(columns)
    fits = min(len(columns), len(stack_neighbor_idxs))
    stack_neighbor_idxs[:fits] = columns[:fits].to(stack_neighbor_idxs.dtype)
    return 0


def query_three_nn_by_stacked_local_idxs_wrapper_stack(
    support_xyz: Tensor,
    new_xyz: Tensor,
    new_xyz_grid_centers: Tensor,
    new_xyz_grid_idxs: Tensor,
    new_xyz_grid_dist2: Tensor,
    stack_neighbor_idxs: Tensor,
    start_len: Tensor,
    M: int,  # noqa: N803 the kernel's name
    num_total_grids: int,
) -> int:
    """The three points of each place's list that are nearest to each cell's centre.

    new_xyz_grid_centers: (M, G, 3).   Written: new_xyz_grid_idxs and new_xyz_grid_dist2 (M, G, 3), rows of support_xyz
    and m^2; the first again where a list has fewer, -1 and inf where it is empty.
    """
    if not len(stack_neighbor_idxs):
        new_xyz_grid_idxs.fill_(-1)
        new_xyz_grid_dist2.fill_(torch.inf)
        return 0
    starts, lengths = start_len.long().unbind(1)
    longest = int(lengths.max())
    step = max(1, PAIRS // (longest * num_total_grids))
    for begin in range(0, len(lengths), step):
        some = slice(begin, begin + step)
        place = torch.arange(longest, device=support_xyz.device)
        real = place < lengths[some, None]  # (m, L)
        listed = (starts[some, None] + place).masked_fill(~real, 0)
        point = stack_neighbor_idxs[listed].long()
        x, y, z = (new_xyz_grid_centers[some, :, None] - support_xyz[point][:, None]).unbind(-1)  # (m, G, L)
        squared = (x * x + y * y + z * z).masked_fill_(~real[:, None], torch.inf)
        for rank in range(3):
            nearest = squared.argmin(2, keepdim=True)  # of equal ones the first
            away = squared.gather(2, nearest).squeeze(2)
            which = point[:, None].expand(-1, num_total_grids, -1).gather(2, nearest).squeeze(2)
            none = away == torch.inf
            if rank == 0:
                first, first_away = which.masked_fill(none, -1), away
            new_xyz_grid_idxs[some, :, rank] = torch.where(none, first, which).to(new_xyz_grid_idxs.dtype)
            new_xyz_grid_dist2[some, :, rank] = torch.where(none, first_away, away)
            squared.scatter_(2, nearest, torch.inf)
    return 0


def vector_pool_wrapper(
    support_xyz: Tensor,
    xyz_batch_cnt: Tensor,
    support_features: Tensor,
    new_xyz: Tensor,
    new_xyz_batch_cnt: Tensor,
    new_features: Tensor,
    new_local_xyz: Tensor,
    point_cnt_of_grid: Tensor,
    grouped_idxs: Tensor,
    num_grid_x: int,
    num_grid_y: int,
    num_grid_z: int,
    max_neighbour_distance: float,
    use_xyz: int,
    num_max_sum_points: int,
    nsample: int,
    neighbor_type: int,
    pooling_type: int,
) -> int:
    """Sums (pooling_type 0) or the first (1) of the features in each cell round each place; how many points count.

    support_features: (N1 + N2 ..., C_in), folded into C = C_out / cells channels.   Written: new_features
    (M1 + M2 ..., cells * C); new_local_xyz (M1 + M2 ..., cells * 3), likewise of the points' offsets; point_cnt_of_grid
    (M1 + M2 ..., cells); grouped_idxs (num_max_sum_points, 3), point, place and cell of what counts, cut off there.
    """
    shape = (num_grid_x, num_grid_y, num_grid_z)
    num_cells = num_grid_x * num_grid_y * num_grid_z
    picks_first = pooling_type == 1
    limit = 0 if picks_first else nsample
    place, point = _neighbours(
        support_xyz, xyz_batch_cnt, new_xyz, new_xyz_batch_cnt, max_neighbour_distance, limit, neighbor_type
    )
    local = support_xyz[point] - new_xyz[place]
    cell = _cell_of(local, max_neighbour_distance, shape)
    group = place * num_cells + cell
    if picks_first:
        group, point, _ = firsts(group, point, max(1, len(support_xyz)), 1)
        limit = min(nsample, num_cells) if nsample > 0 else num_cells
        place, point, _, group = _first_of_places(group // num_cells, point, group, limit, len(support_xyz))
        cell, local = group % num_cells, support_xyz[point] - new_xyz[place]
    ones = torch.ones_like(group, dtype=point_cnt_of_grid.dtype)
    point_cnt_of_grid.view(-1).scatter_add_(0, group, ones)
    num_channels = new_features.shape[1] // num_cells
    folded = support_features[point].unflatten(1, (-1, num_channels))
    pooled = folded[:, -1] if picks_first else folded.sum(1)  # the kernel writes over what it does not add
    new_features.view(-1, num_channels).index_add_(0, group, pooled)
    if use_xyz:
        new_local_xyz.view(-1, 3).index_add_(0, group, local)
    fits = min(len(point), num_max_sum_points)
    grouped_idxs[:fits] = torch.stack([point, place, cell], dim=1)[:fits].to(grouped_idxs.dtype)
    return len(point)


def vector_pool_grad_wrapper(
    grad_new_features: Tensor, point_cnt_of_grid: Tensor, grouped_idxs: Tensor, grad_support_features: Tensor
) -> int:
    """Adds to grad_support_features (N1 + N2 ..., C_in) what grad_new_features (M1 + M2 ..., cells * C) says."""
    point, place, cell = grouped_idxs.long().unbind(1)
    num_cells = point_cnt_of_grid.shape[1]
    grad = grad_new_features.view(len(grad_new_features), num_cells, -1)[place, cell]
    grad = grad / point_cnt_of_grid[place, cell, None].clamp(min=1)
    times = grad_support_features.shape[1] // grad.shape[1]
    grad_support_features.index_add_(0, point, grad.repeat(1, times))
    return 1


def _neighbours(
    points: Tensor, counts: Tensor, places: Tensor, place_counts: Tensor, reach: float, limit: int, kind: int
) -> tuple[Tensor, Tensor]:
    """Places and the first `limit` points (all where < 1) within a ball or a cube round each, in order: (P,) each."""
    empty = torch.zeros(0, dtype=torch.int64, device=points.device)
    found: list[tuple[Tensor, Tensor]] = [(empty, empty)]
    squared = points.new_tensor(reach) ** 2
    for asked, searched in segments(place_counts, counts):
        for rows, columns in near_pairs(points[searched], places[asked], reach):
            local = points[searched][columns] - places[asked][rows]
            x, y, z = local.unbind(1)
            within = x * x + y * y + z * z <= squared if kind == BALL else (local.abs() <= reach).all(1)
            rows, columns, _ = firsts(rows[within], columns[within], searched.stop - searched.start, limit)
            found.append((rows + asked.start, columns + searched.start))
    rows, columns = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows, columns


def _cell_of(local: Tensor, reach: float, shape: tuple[int, int, int]) -> Tensor:
    """Flat cell, x the slowest, of offsets (P, 3) within +-reach; on the far face the next one's, as in the kernel."""
    size = local.new_tensor([reach * 2 / count for count in shape])
    x, y, z = ((local + reach) / size).floor().long().unbind(1)
    return ((x * shape[1] + y) * shape[2] + z).clamp(0, shape[0] * shape[1] * shape[2] - 1)


def _first_of_places(
    place: Tensor, point: Tensor, group: Tensor, limit: int, num_points: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first `limit` points of each place, in order, and their groups."""
    order = (place * max(1, num_points) + point).sort(stable=True).indices
    ranks = ranks_of_sorted(place[order])
    order = order[ranks < limit]
    return place[order], point[order], ranks[ranks < limit], group[order]
