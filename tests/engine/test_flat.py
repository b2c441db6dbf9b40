"""Flat buffers give the numbers of torch.optim and clip_grad_norm_, whatever the model is made of."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optimization import OPTIMIZATION, settings
from torch import nn

from raytrain.engine.engine import Engine
from raytrain.engine.optim import optimizer_options, parameter_groups, torch_groups
from raytrain.engine.world import World
from raytrain.errors import TaskError, TrainingError

OPTIMIZERS = ["adam", "adamw", "sgd", "adam_onecycle", "adam_cosineanneal"]
OPTIM = {**OPTIMIZATION, "LR": 0.02}


def engine_of(model: nn.Module, **changes: Any) -> Engine:
    return Engine(model, SimpleNamespace(**{**OPTIM, **changes}), World())


class Tied(nn.Module):
    """One table, read at the input and at the output."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.out = nn.Linear(6, 7)
        self.out.weight = self.table.weight

    def forward(self, step: int) -> torch.Tensor:
        return self.out(self.mix(self.table(torch.tensor([step % 7, 3, 3]))).tanh())


class Frozen(nn.Module):
    """Layers that are not trained, among those that are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 2))

    def forward(self, step: int) -> torch.Tensor:
        return self.net(noise(step, 4, 5))


class Branches(nn.Module):
    """Branches taken in some steps only, one never; a scalar, and a parameter on the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.first = nn.Linear(4, 4)
        self.branches = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.never = nn.Linear(4, 4)
        self.last = nn.Linear(4, 1)

    def forward(self, step: int) -> torch.Tensor:
        x = self.first(noise(step, 3, 4))
        if step > 1:
            x = self.branches[step % 3](x)
        return self.last(x.tanh()) * self.scale


class Convolutions(nn.Module):
    """BatchNorm, and weights in the channels_last order."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, step: int) -> torch.Tensor:
        return self.net(noise(step, 2, 3, 8, 8).to(memory_format=torch.channels_last))


class TwoPrecisions(nn.Module):
    """f32 and f64 side by side, and an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.Linear(4, 4)
        self.fine = nn.Linear(4, 2).double()
        self.empty = nn.Parameter(torch.empty(0))

    def forward(self, step: int) -> torch.Tensor:
        return self.fine(self.coarse(noise(step, 3, 4)).double()) + self.empty.sum()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, num_layers=2)

    def forward(self, step: int) -> torch.Tensor:
        return self.lstm(noise(step, 4, 2, 3))[0]


class Reassigning(nn.Module):
    """Puts another tensor behind its weight in each forward pass, as some normalisations do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, step: int) -> torch.Tensor:
        self.linear.weight.data = self.linear.weight.data / self.linear.weight.data.norm()
        return self.linear(noise(step, 3, 4))


class Sparse(nn.Module):
    """Gradients that come as sparse tensors; torch's Adam refuses them, so its twin is dense."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 3, sparse=True)
        self.out = nn.Linear(3, 1)

    def forward(self, step: int) -> torch.Tensor:
        return self.out(self.table(torch.tensor([step % 9, 2])))


def noise(step: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


ZOO: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "frozen": Frozen,
    "branches": Branches,
    "batchnorm": Convolutions,
    "f32 and f64": TwoPrecisions,
    "lstm": Recurrent,
    "reassigned data": Reassigning,
    "sparse": Sparse,
}


def plain_torch(model: nn.Module, optimizer: str) -> torch.optim.Optimizer:
    """What the heritage's user would write by hand."""
    lr, decay = OPTIM["LR"], OPTIM["WEIGHT_DECAY"]
    if optimizer in ("adam_onecycle", "adam_cosineanneal"):
        groups = [{"params": group} for group in parameter_groups(model, legacy=False)]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.95, 0.99), weight_decay=decay)
    params = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=decay)
    return (torch.optim.AdamW if optimizer == "adamw" else torch.optim.Adam)(params, lr=lr, weight_decay=decay)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("member", ZOO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_the_numbers_are_those_of_torch_optim_and_clip_grad_norm(
    member: str, optimizer: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    model = ZOO[member]()
    if dtype is torch.float64:
        model = model.double()
        drawn = noise
        monkeypatch.setitem(globals(), "noise", lambda *args: drawn(*args).double())
    twin = copy.deepcopy(model)
    if isinstance(twin, Sparse):
        twin.table.sparse = False
    engine = engine_of(model, OPTIMIZER=optimizer)
    assert engine.why_ddp is None
    reference = plain_torch(twin, optimizer)
    allowed = {"rtol": 1e-12, "atol": 1e-13} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-7}
    for step in range(8):
        if dtype is torch.float32:  # step by step: Adam makes rounding of a gradient near zero as large as lr
            twin.load_state_dict(model.state_dict())
            reference.load_state_dict(engine.optimizer_state())
        decay = OPTIM["WEIGHT_DECAY"] * (1 + step // 4)
        momentum = 0.9 if optimizer == "sgd" else 0.95 - 0.01 * step
        lr = 0.02 / (1 + step)
        engine.zero_grad()
        for part in range(2):  # accumulated
            engine.backward(model(step + 10 * part).square().mean(), 0.5)
        found = engine.step(settings(lr, momentum, clip=0.5, weight_decay=decay), ())
        reference.zero_grad()
        for part in range(2):
            (twin(step + 10 * part).square().mean() * 0.5).backward()
        norm = nn.utils.clip_grad_norm_([p for p in twin.parameters() if p.requires_grad], 0.5)
        for group in reference.param_groups:
            group.update(lr=lr, weight_decay=decay)
            group.update({"betas": (momentum, group["betas"][1])} if "betas" in group else {"momentum": momentum})
        reference.step()
        torch.testing.assert_close(found.grad_norm.double(), norm.double(), **allowed)
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), **allowed)
    ours, theirs = engine.optimizer_state(), reference.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"], **allowed)
    reference.load_state_dict(ours)  # theirs reads ours
    engine.load_optimizer_state(theirs)  # and ours theirs
    torch.testing.assert_close(engine.optimizer_state()["state"], theirs["state"], rtol=0, atol=0)


def test_the_zoo_has_norms_on_both_sides_of_the_clip() -> None:
    norms = []
    for build in ZOO.values():
        torch.manual_seed(5)
        model = build()
        engine = engine_of(model, OPTIMIZER="adamw")
        engine.zero_grad()
        engine.backward(model(0).square().mean(), 1.0)
        norms.append(engine.step(settings(0.0, clip=0.5), ()).grad_norm.item())
    assert min(norms) < 0.5 < max(norms)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_groups_of_a_state_are_those_that_torch_writes(optimizer: str) -> None:
    model = Convolutions()
    sizes = [len(g["params"]) for g in plain_torch(model, optimizer).state_dict()["param_groups"]]
    found = torch_groups(sizes, optimizer_options(SimpleNamespace(**{**OPTIM, "OPTIMIZER": optimizer})), settings(0.02))
    expected = plain_torch(model, optimizer).state_dict()["param_groups"]
    assert found == expected
    assert [list(group) for group in found] == [list(group) for group in expected]  # the order of keys too


def test_sgd_without_momentum_keeps_no_moments() -> None:
    model = nn.Linear(3, 1)
    engine = engine_of(model, OPTIMIZER="sgd", MOMENTUM=0.0)
    engine.zero_grad()
    engine.backward(model(torch.ones(1, 3)).sum(), 1.0)
    engine.step(settings(clip=0.5), ())
    assert engine.optimizer_state()["state"] == {}


def test_parameters_lie_in_one_buffer_and_modules_see_views() -> None:
    model = Frozen()
    before = copy.deepcopy(model.state_dict())
    engine_of(model, OPTIMIZER="adamw")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len({p.untyped_storage().data_ptr() for p in trained}) == 1
    assert all(p.data_ptr() % 64 == trained[0].data_ptr() % 64 for p in trained)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_norm_of_many_numbers_is_right() -> None:
    """One f32 sum over 30 million squares is off by 3e-3."""
    model = nn.Linear(30_000_000, 1, bias=False)
    engine = engine_of(model, OPTIMIZER="sgd", MOMENTUM=0.0)
    x = torch.randn(30_000_000, generator=torch.Generator().manual_seed(1))
    engine.zero_grad()
    engine.backward(model(x), 1.0)
    norm = engine.step(settings(0.0), ()).grad_norm
    assert norm.item() == pytest.approx(x.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_shows_and_changes_nothing(value: float) -> None:
    model = nn.Linear(3, 1)
    engine = engine_of(model, OPTIMIZER="adamw")
    engine.zero_grad()
    engine.backward(model(torch.ones(1, 3)).sum() * value, 1.0)
    before = model.weight.detach().clone()
    assert not engine.step(settings(clip=0.5), ()).grad_norm.isfinite()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", ["flat", "ddp"])
def test_a_live_state_is_the_memory_that_steps_change_and_reads_like_a_copy(kind: str, optimizer: str) -> None:
    model = Branches()
    engine = engine_of(model, OPTIMIZER=optimizer, ENGINE=kind)
    for step in range(4):
        live = engine.optimizer_state(live=True)
        engine.zero_grad()
        engine.backward(model(step).square().mean(), 1.0)
        engine.step(settings(momentum=0.9, clip=0.5), ())
        after = engine.optimizer_state()
        for position, entry in live["state"].items():
            assert list(entry) == list(after["state"][position])
            assert all(torch.equal(tensor, after["state"][position][name]) for name, tensor in entry.items())
    again = engine.optimizer_state(live=True)
    assert list(again["state"]) == list(after["state"]) and again["param_groups"] == after["param_groups"]


# What flat buffers cannot hold


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, step: int) -> torch.Tensor:
        return (self.phase * self.gain).abs()


class Aliased(nn.Module):
    """Two parameters, one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight.data = self.a.weight.data

    def forward(self, step: int) -> torch.Tensor:
        return self.b(self.a(noise(step, 2, 3)))


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3).bfloat16()

    def forward(self, step: int) -> torch.Tensor:
        return self.linear(noise(step, 2, 3).bfloat16()).float()


@pytest.mark.parametrize(
    ("build", "changes", "reason"),
    [
        (Complex, {}, "phase is torch.complex64"),
        (Half, {}, "linear.weight is torch.bfloat16"),
        (Aliased, {}, "a.weight and b.weight share memory"),
        (Frozen, {"USE_AMP": True}, "fp16's loss scaler works on torch's own optimizer"),
    ],
    ids=["complex", "bfloat16", "aliased", "fp16"],
)
def test_what_flat_buffers_cannot_hold_trains_parameter_by_parameter_and_says_why(
    build: Callable[[], nn.Module], changes: dict[str, Any], reason: str
) -> None:
    model = build()
    engine = engine_of(model, OPTIMIZER="adamw", **changes)
    assert engine.why_ddp == reason and engine.arithmetic["engine"] == "ddp"
    before = copy.deepcopy(model.state_dict())
    engine.zero_grad()
    with engine.precision.autocast():
        loss = model(0).float().square().mean()
    engine.backward(loss, 1.0)
    engine.step(settings(clip=0.5), ())
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(TaskError, match=f"ENGINE is flat, but {reason}"):
        engine_of(build(), OPTIMIZER="adamw", **{**changes, "ENGINE": "flat"})


def test_aliases_stay_aliases() -> None:
    model = Aliased()
    engine = engine_of(model, OPTIMIZER="sgd")
    for step in range(2):
        engine.zero_grad()
        engine.backward(model(step).square().mean(), 1.0)
        engine.step(settings(clip=0.5), ())
    assert model.a.weight.data_ptr() == model.b.weight.data_ptr()


def test_a_parameter_that_changes_its_type_while_training_is_an_error_that_names_it() -> None:
    model = nn.Linear(3, 1)
    engine = engine_of(model, OPTIMIZER="adamw")
    engine.zero_grad()
    engine.backward(model(torch.ones(1, 3)).sum(), 1.0)
    model.bias.data = model.bias.data.double()
    with pytest.raises(TrainingError, match=r"bias was \(1,\) torch.float32 on cpu .*ENGINE: ddp"):
        engine.step(settings(clip=0.5), ())


def test_a_saved_model_holds_its_own_numbers_and_no_others() -> None:
    """torch.save writes the memory behind a view: a state of views would be the whole buffer for each."""
    from raytrain.storage.state_file import owned

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    engine_of(model, OPTIMIZER="adamw")
    file = io.BytesIO()
    torch.save(owned(model.state_dict()["0.bias"]), file)
    assert file.tell() < 4096
