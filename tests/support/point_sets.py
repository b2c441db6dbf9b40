"""Point sets that operations on points go wrong on, and the derivative of a kernel by its own backward kernel."""

import numpy as np
import torch


def point_sets(num_points, num_places, seed=0):
    """Name -> (points (N, 3), places (M, 3)) float32, metres: scattered, crowded, on a lattice, alike, far, broken."""
    random = np.random.default_rng(seed)
    points, places = random.uniform(-4, 4, (num_points, 3)), random.uniform(-5, 5, (num_places, 3))
    broken = points.copy()
    broken[::5] = np.nan
    sets = {
        "scattered": (points, places),
        "of one point": (points[:1], places),
        "crowded": (points * [0.01, 0.01, 1] + [70, -40, 0], places * 0.1 + [70, -40, 0]),
        "on a lattice": (np.round(points), np.round(places)),
        "alike": (np.repeat(points[:3], num_points // 3, axis=0), places),
        "all at one place": (np.zeros((num_points, 3)), np.zeros((num_places, 3))),
        "with one far away": (np.vstack([points, [1e5, -1e5, 0]]), np.vstack([places, [1e5, -1e5, 0.5]])),
        "broken": (broken, places),
        "empty": (points[:0], places),
        "without a place": (points, places[:0]),
    }
    return {name: tuple(torch.tensor(part, dtype=torch.float32) for part in pair) for name, pair in sets.items()}


def boxes_round(points, count, seed=0):
    """(count, 7) float32 boxes about some of the points: turned, flat, of no size, and one with points on its faces."""
    random = np.random.default_rng(seed)
    centres = points.numpy()[random.integers(0, len(points), count)] if len(points) else np.zeros((count, 3))
    boxes = np.column_stack([np.nan_to_num(centres), random.uniform(0.5, 5, (count, 3)), random.uniform(-7, 7, count)])
    boxes[0, 3:6] = 0
    boxes[-1] = [0, 0, 0, 2, 4, 2, 0]
    return torch.tensor(boxes, dtype=torch.float32)


class Kernel(torch.autograd.Function):
    """A function of one tensor by two kernels, as pcdet makes them: forward(x) and backward(grad of the result)."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_kernel = backward
        return forward(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.backward_kernel(grad.contiguous()), None, None
