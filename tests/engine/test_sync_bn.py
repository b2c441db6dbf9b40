"""BatchNorm over two processes is BatchNorm over the whole batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from processes import Pair
from torch import nn

from raytrain.engine.sync_bn import HostSyncBatchNorm, convert_to_host_sync_batchnorm

SHAPES = {"1d": (7, 5), "1d long": (6, 5, 4), "2d": (6, 5, 3, 4), "3d": (4, 5, 2, 3, 2)}
LAYERS = {"1d": nn.BatchNorm1d, "1d long": nn.BatchNorm1d, "2d": nn.BatchNorm2d, "3d": nn.BatchNorm3d}


def layer_of(kind: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    layer = LAYERS[kind](5, **options).to(dtype)
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2, 5)), layer.bias.copy_(torch.linspace(-1, 1, 5))
    return layer


def batch_of(kind: str, step: int, dtype: torch.dtype) -> torch.Tensor:
    """Far from 0, where a variance from sums of squares cancels."""
    x = torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (3 * x + 100).to(dtype)


def forward_and_backward(layer: nn.Module, parts: list[torch.Tensor]) -> dict[str, Any]:
    """Two steps on these (one for each step); the loss weighs every value differently."""
    outputs, input_grads = [], []
    for x in parts:
        x = x.clone().requires_grad_()
        y = layer(x)
        (y.square() * x.detach().sin()).sum().backward()
        outputs.append(y.detach()), input_grads.append(x.grad)
    grads = [p.grad for p in layer.parameters()]
    return {"outputs": outputs, "input_grads": input_grads, "grads": grads, "buffers": dict(layer.named_buffers())}


def halves(rank: int, kind: str, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    layer = convert_to_host_sync_batchnorm(layer_of(kind, dtype, **options))
    cut = SHAPES[kind][0] // 2 + 1  # of different sizes
    return forward_and_backward(layer, [batch_of(kind, s, dtype).split(cut)[rank] for s in range(2)])


@pytest.mark.parametrize("options", [{}, {"eps": 1e-3, "momentum": 0.01}, {"momentum": None}, {"affine": False}])
@pytest.mark.parametrize("kind", SHAPES)
def test_two_processes_equal_one_with_the_whole_batch(pair: Pair, kind: str, options: dict[str, Any]) -> None:
    whole = forward_and_backward(
        layer_of(kind, torch.float64, **options), [batch_of(kind, s, torch.float64) for s in range(2)]
    )
    first, second = pair.run(halves, kind, torch.float64, options)
    for key in ("outputs", "input_grads"):
        together = [torch.cat(parts) for parts in zip(first[key], second[key], strict=True)]
        torch.testing.assert_close(together, whole[key], rtol=1e-11, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")
    summed = [a + b for a, b in zip(first["grads"], second["grads"], strict=True)]
    torch.testing.assert_close(summed, whole["grads"], rtol=1e-11, atol=1e-11)
    for buffers in (first["buffers"], second["buffers"]):
        torch.testing.assert_close(buffers, whole["buffers"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_have_their_statistics_in_f32(pair: Pair, dtype: torch.dtype) -> None:
    """As torch's: the layer is f32, its input comes out of autocast."""
    batches = [batch_of("2d", s, dtype) for s in range(2)]
    whole = forward_and_backward(layer_of("2d", torch.float32), batches)
    first, second = pair.run(halves_in, dtype)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    together = [torch.cat(parts) for parts in zip(first["outputs"], second["outputs"], strict=True)]
    assert together[0].dtype is whole["outputs"][0].dtype
    torch.testing.assert_close(together, whole["outputs"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(first["buffers"], whole["buffers"], rtol=1e-4, atol=1e-4)


def halves_in(rank: int, dtype: torch.dtype) -> dict[str, Any]:
    layer = convert_to_host_sync_batchnorm(layer_of("2d", torch.float32))
    return forward_and_backward(layer, [batch_of("2d", s, dtype).split(4)[rank] for s in range(2)])


def test_evaluation_is_local_and_uses_the_running_statistics() -> None:
    layer = layer_of("2d", torch.float32)
    layer(batch_of("2d", 0, torch.float32))
    layer.eval()
    synchronised = convert_to_host_sync_batchnorm(copy.deepcopy(layer))
    x = batch_of("2d", 1, torch.float32)
    assert torch.equal(synchronised(x), layer(x))  # no process group stands here


def test_conversion_keeps_names_parameters_buffers_and_mode() -> None:
    model = nn.Sequential(nn.Conv2d(1, 5, 1), nn.Sequential(nn.BatchNorm2d(5, eps=1e-3), nn.ReLU()), nn.BatchNorm1d(5))
    model[2].eval()
    before = model.state_dict()
    parameters = list(model.parameters())
    converted = convert_to_host_sync_batchnorm(model)
    assert list(converted.state_dict()) == list(before)
    assert [p is q for p, q in zip(converted.parameters(), parameters, strict=True)] == [True] * len(parameters)
    assert isinstance(converted[1][0], HostSyncBatchNorm) and converted[1][0].eps == 1e-3
    assert converted[1][0].training and not converted[2].training
    assert convert_to_host_sync_batchnorm(converted)[2] is converted[2]


def test_an_input_without_samples_and_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 dimensions, got 1"):
        HostSyncBatchNorm(3)(torch.ones(3))
