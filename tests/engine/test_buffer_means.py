"""With OPTIMIZATION.BUFFERS: mean a step leaves the mean over the virtual workers, and says where there is none."""

from __future__ import annotations

import math

import pytest
import torch
from optimization import optim_cfg, settings
from processes import Pair
from torch import nn

from raytrain.engine.engine import Engine
from raytrain.engine.world import World
from raytrain.errors import TaskError


class Net(nn.Module):
    """BatchNorm, a buffer in f64 that forward counts in, one that no checkpoint holds, and one that a step may grow."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 3), nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(2, dtype=dtype))
        self.register_buffer("last", torch.zeros(()), persistent=False)
        self.seen: torch.Tensor
        self.last: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.abs().mean().to(self.seen.dtype) / 3
        self.last = x.mean().detach()
        return self.norm(self.layer(x)).relu()


def batch(step: int, v: int) -> torch.Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(10 * step + v)) * (1 + v)


def trained(
    rank: int,
    size: int,
    engine: str = "auto",
    is_exact: bool = True,
    bad_step: int | None = None,
    buffers: str = "mean",
) -> dict[str, torch.Tensor]:
    """Buffers after two steps of four virtual workers."""
    torch.manual_seed(0)
    model, world = Net(), World(rank, size, 4)
    cfg = optim_cfg(OPTIMIZER="sgd", LR=0.1, BUFFERS=buffers, ENGINE=engine)
    made = Engine(model, cfg, world, is_exact=is_exact)
    for step in range(2):
        made.begin_step(step)
        for v in world.block:
            with made.virtual_worker(1):
                loss = model(batch(step, v)).square().mean()
                made.backward(loss * (math.nan if step == bad_step else 1.0), 0.25)
        made.step(settings(), ())
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def by_hand() -> dict[str, torch.Tensor]:
    """The same with a model for each virtual worker."""
    torch.manual_seed(0)
    model = Net()
    for step in range(2):
        of_all = []
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        gradients = [torch.zeros_like(p) for p in model.parameters()]
        for v in range(4):
            model.load_state_dict(start)
            model.zero_grad()
            (model(batch(step, v)).square().mean() / 4).backward()
            for total, p in zip(gradients, model.parameters(), strict=True):
                total += p.grad
            of_all.append({name: buffer.clone() for name, buffer in model.named_buffers()})
        with torch.no_grad():
            for p, total in zip(model.parameters(), gradients, strict=True):
                p -= 0.1 * (total + 0.05 * p)
            for name, buffer in model.named_buffers():
                values = [each[name] for each in of_all]
                has_mean = buffer.is_floating_point() and name != "last"
                buffer.copy_(torch.stack(values).mean(0) if has_mean else values[0])
    return dict(model.named_buffers())


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("engine", ["flat", "ddp"])
def test_statistics_are_the_mean_and_counts_and_caches_the_first_ones(engine: str, is_exact: bool, pair: Pair) -> None:
    expected = by_hand()
    for found in (trained(0, 1, engine, is_exact), *pair.run(trained, 2, engine, is_exact)):
        for name in expected.keys() - {"last"}:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
        assert found["norm.num_batches_tracked"] == 2 and found["seen"].dtype is torch.float64
        torch.testing.assert_close(found["last"], batch(1, 0).mean())
    assert not torch.allclose(trained(0, 1, engine, is_exact, buffers="first")["seen"], expected["seen"])


def test_a_bad_step_leaves_them_as_they_were() -> None:
    good, bad = trained(0, 1, bad_step=0), trained(0, 1, bad_step=1)
    assert good["norm.num_batches_tracked"] == bad["norm.num_batches_tracked"] == 1
    assert bad["norm.running_mean"].isfinite().all() and not torch.equal(good["seen"], bad["seen"])


def test_one_that_has_another_shape_by_now_is_refused_by_name() -> None:
    model = Net()
    engine = Engine(model, optim_cfg(OPTIMIZER="sgd", LR=0.1, BUFFERS="mean"), World(virtual_workers=2))
    engine.begin_step(0)
    said = r"buffer seen was \(2,\) of torch.float64 when training began and is \(5,\) of torch.float32 now. Set OPTIM"
    with pytest.raises(TaskError, match=said), engine.virtual_worker(1):
        model.seen = torch.zeros(5)
        engine.backward(model(batch(0, 0)).square().mean(), 0.5)


def test_a_model_without_any_trains_as_ever() -> None:
    model = nn.Linear(5, 1)
    engine = Engine(model, optim_cfg(OPTIMIZER="sgd", LR=0.1, BUFFERS="mean"), World(virtual_workers=2))
    engine.begin_step(0)
    for v in range(2):
        with engine.virtual_worker(1):
            engine.backward(model(batch(0, v)).square().mean(), 0.5)
    assert engine.step(settings(), ()).loss.isfinite()
