"""Farthest point sampling: points chosen one after the other, each as far as can be from all before it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def farthest_points(points: Tensor, squared: Tensor, count: int) -> Tensor:
    """Row numbers (count,) of `count` points, the first being row 0; of equally far ones the first.

    points: (N, 3); squared: (N,) m^2 to the nearest chosen one, kept up to date (begin with 1e10).
    """
    chosen = torch.zeros(count, dtype=torch.int64, device=points.device)
    if count <= 1 or not len(points):
        return chosen
    coordinates = points.detach().t().contiguous()  # (3, N)
    if points.device.type == "cpu":  # each step is 12 us in numpy and 53 us in torch, at 16,384 points
        _choose(coordinates.numpy(), squared.numpy(), chosen.numpy())
        return chosen
    for step in range(1, count):
        x, y, z = (coordinates - coordinates[:, chosen[step - 1], None]).square_()
        torch.minimum(squared, x.add_(y).add_(z), out=squared)
        chosen[step] = squared.argmax()
    return chosen


def _choose(coordinates: NDArray[np.floating], squared: NDArray[np.floating], chosen: NDArray[np.int64]) -> None:
    away = np.empty_like(coordinates)
    x, y, z = away
    last = 0
    for step in range(1, len(chosen)):
        np.subtract(coordinates, coordinates[:, last, None], out=away)
        np.multiply(away, away, out=away)
        np.add(x, y, out=x)
        np.add(x, z, out=x)
        np.minimum(squared, x, out=squared)
        last = int(squared.argmax())
        chosen[step] = last
