"""Clipping is torch's clip_grad_norm_, without a host sync."""

import math

import pytest
import torch

from raytrain.engine.optim import clip_gradients


def parameters_with_gradients(dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((4, 3), (5,), ())]
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_norm_and_gradients_are_those_of_clip_grad_norm(dtype, max_norm):
    ours, theirs = parameters_with_gradients(dtype), parameters_with_gradients(dtype)
    norm = clip_gradients(iter(ours), max_norm)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


def test_the_norm_is_the_one_before_clipping_and_the_coefficient_has_the_heritages_epsilon():
    parameters = parameters_with_gradients()
    before = torch.cat([p.grad.flatten() for p in parameters])
    norm = clip_gradients(parameters, 0.5)
    after = torch.cat([p.grad.flatten() for p in parameters])
    assert norm.item() == pytest.approx(before.norm().item(), rel=1e-14)
    torch.testing.assert_close(after, before * 0.5 / (norm + 1e-6), rtol=1e-14, atol=0)


def test_none_measures_and_leaves_every_gradient_as_it_was():
    parameters, untouched = parameters_with_gradients(scale=100), parameters_with_gradients(scale=100)
    norm = clip_gradients(parameters, None)
    assert norm.item() == pytest.approx(torch.cat([p.grad.flatten() for p in untouched]).norm().item())
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(parameters, untouched, strict=True))


def test_parameters_without_gradient_count_for_nothing():
    parameters = parameters_with_gradients()
    unused = torch.nn.Parameter(torch.ones(3))
    assert torch.equal(clip_gradients([unused, *parameters], None), clip_gradients(parameters, None))
    assert clip_gradients([unused], 1.0).item() == 0
    assert unused.grad is None


def test_the_norm_is_a_scalar_tensor_without_a_graph():
    norm = clip_gradients(parameters_with_gradients(torch.float32), 1.0)
    assert (norm.shape, norm.dtype, norm.requires_grad) == (torch.Size([]), torch.float32, False)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(bad):
    parameters = parameters_with_gradients()
    parameters[1].grad[2] = bad
    assert not torch.isfinite(clip_gradients(parameters, 1.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: sync debug mode exists only there")
@pytest.mark.parametrize("max_norm", [0.5, None])
def test_clipping_never_waits_for_the_device(max_norm):
    parameters = [torch.nn.Parameter(p.detach().cuda()) for p in parameters_with_gradients()]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = clip_gradients(parameters, max_norm)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.is_cuda
