"""Parameters keep their shape and strides in a flat buffer."""

from __future__ import annotations

import torch

from raytrain.engine.layout import ROW, Layout


def test_a_layout_keeps_strides_and_leaves_no_overlap() -> None:
    params = [torch.randn(3), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(4, 5).t()]
    layout = Layout(params)
    buffer = torch.zeros(layout.sizes[torch.float32])
    assert len(buffer) % ROW == 0
    views = layout.views({torch.float32: buffer})
    for view, param in zip(views, params, strict=True):
        view.copy_(param)
    for view, param in zip(views, params, strict=True):
        assert torch.equal(view, param) and view.stride() == param.stride()
    assert buffer.count_nonzero() == sum(p.numel() for p in params)
