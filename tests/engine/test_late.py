"""What a GPU computed is read two steps later, in order."""

from __future__ import annotations

import torch

from raytrain.engine.late import LateReader


def test_what_is_late_comes_in_order_after_two_steps() -> None:
    reader = LateReader()
    assert [reader.swap(torch.tensor([float(i)])) for i in range(4)] == [None, None, [0.0], [1.0]]
    assert [LateReader([[7.0], [8.0]]).swap(torch.tensor([1.0]))] == [[7.0]]
