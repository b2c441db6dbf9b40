"""Optimizers: OpenPCDet's own numbers (tests/golden/toy), groups, pickling, states of other makers."""

import copy
import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optimization
import pytest
import torch
from torch import nn

from raytrain.engine.engine import Engine
from raytrain.engine.optim import (
    optimizer_options,
    parameter_groups,
    set_schedule,
    stepped_groups,
    torch_optimizer,
    unstepped_parameters,
    unused_options,
)
from raytrain.engine.schedule import StepSettings, build_schedule
from raytrain.engine.sync_bn import HostSyncBatchNorm
from raytrain.engine.world import World
from raytrain.errors import CheckpointError, ConfigError, TaskError

TOY = Path(__file__).parents[1] / "golden" / "toy"
INDEX = json.loads((TOY / "index.json").read_text())
OPTIMIZERS = ["adam", "sgd", "adamw", "adam_onecycle", "adam_cosineanneal"]
SETTINGS = StepSettings(lr=0.01, momentum=None, clip=10, weight_decay=0.01)


def optim_cfg(**changes):
    """With a schedule, as that of OpenPCDet's own runs."""
    heritage = {
        "OPTIMIZER": "adam_onecycle",
        "SCHEDULER": None,
        "LR": 0.01,
        "WEIGHT_DECAY": 0.01,
        "PCT_START": 0.4,
        "DIV_FACTOR": 10,
        "DECAY_STEP_LIST": [1, 2],
        "LR_DECAY": 0.1,
        "LR_CLIP": 5e-4,
        "LR_WARMUP": False,
        "WARMUP_EPOCH": 1,
        "WARMUP_ITER": 5,
        "GRAD_NORM_CLIP": 10,
        "PHASES": [],
    }
    return optimization.optim_cfg(**{**heritage, **changes})


ENGINES = pytest.mark.parametrize("engine", ["flat", "ddp"])


def engine_of(model, cfg, engine="flat"):
    return Engine(model, SimpleNamespace(**{**vars(cfg), "ENGINE": engine}), World())


def build_optimizer(model, cfg):
    return torch_optimizer(stepped_groups(model, cfg), optimizer_options(cfg))


def step_once(engine, loss, settings=SETTINGS):
    engine.zero_grad()
    engine.backward(loss, 1.0)
    return engine.step(settings, ())


class ToyNet(nn.Module):
    """The net of tests/golden/toy. x: (B, 2, 8, 8).   Returns logits (B, 3)."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6, eps=1e-3, momentum=0.01)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()  # (B, 6, 8, 8)
        x = self.bn2(self.conv2(x)).relu()  # (B, 8, 4, 4)
        return self.fc(x.mean((2, 3)))


def toy_net(dtype):
    net = ToyNet()
    net.load_state_dict({name: torch.from_numpy(value) for name, value in np.load(TOY / "init.npz").items()})
    return net.to(dtype)


def run_toy(cfg, dtype, kind="flat"):
    """Three epochs of the seven batches, as the loop does it.   Returns net, engine and each step's numbers."""
    data = np.load(TOY / "data.npz")
    x, y = torch.from_numpy(data["x"]).to(dtype), torch.from_numpy(data["y"])
    net = toy_net(dtype)
    engine = engine_of(net, cfg, kind)
    schedule = build_schedule(cfg, steps_per_epoch=7, num_epochs=3)
    seen = {"lr": [], "mom": [], "loss": [], "gnorm": [], "weights": []}
    for step in range(21):
        loss = 8 * nn.functional.cross_entropy(net(x[step % 7]), y[step % 7])
        norm = step_once(engine, loss, schedule.at(step)).grad_norm
        groups = engine.optimizer_state()["param_groups"]
        seen["lr"].append([group["lr"] for group in groups])
        seen["mom"].append(groups[0]["betas"][0] if "betas" in groups[0] else groups[0]["momentum"])
        seen["loss"].append(loss.item())
        seen["gnorm"].append(norm.item())
        seen["weights"].append(torch.cat([p.detach().flatten() for p in net.parameters()]).double().numpy())
    return net, engine, {key: np.array(values) for key, values in seen.items()}


GOLDEN_RUNS = pytest.mark.parametrize("run", ["adam_onecycle_clip10_f64", "sgd_clip10_f64"])


@ENGINES
@GOLDEN_RUNS
def test_a_run_in_f64_is_the_heritages_to_1e_12(run, engine):
    golden = np.load(TOY / f"{run}.npz")
    net, trained, seen = run_toy(optim_cfg(**INDEX[run]["optim_cfg"]), torch.float64, engine)
    assert np.array_equal(seen["lr"], golden["lr"])
    assert np.array_equal(seen["mom"], golden["mom"])
    for key in ("loss", "gnorm", "weights"):
        np.testing.assert_allclose(seen[key], golden[key], rtol=0, atol=1e-12, err_msg=key)
    for name, value in net.state_dict().items():
        np.testing.assert_allclose(value, golden[f"final.{name}"], rtol=0, atol=1e-12, err_msg=name)
    for index, moments in trained.optimizer_state()["state"].items():
        for key, value in moments.items():
            np.testing.assert_allclose(value, golden[f"opt.{index}.{key}"], rtol=0, atol=1e-12)


@ENGINES
@GOLDEN_RUNS
def test_a_run_in_f32_stays_at_the_heritages_to_rounding(run, engine):
    golden = np.load(TOY / f"{run}.npz")
    _, _, seen = run_toy(optim_cfg(**INDEX[run]["optim_cfg"]), torch.float32, engine)  # measured: 5e-7
    assert np.array_equal(seen["lr"], golden["lr"])
    np.testing.assert_allclose(seen["weights"], golden["weights"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_betas_are_for_adam_and_adamw(optimizer):
    group = build_optimizer(ToyNet(), optim_cfg(OPTIMIZER=optimizer, BETAS=[0.8, 0.95])).param_groups[0]
    assert group["betas"] == (0.8, 0.95)


@pytest.mark.parametrize(("betas", "expected"), [(None, (0.95, 0.99)), ([0.9, 0.999], (0.95, 0.999))])
def test_moms_overwrite_the_first_of_betas_in_adam_onecycle(betas, expected):
    for group in build_optimizer(ToyNet(), optim_cfg(BETAS=betas)).param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == (expected, 1e-8, 0.01)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"OPTIMIZER": "adamw"}, ""),
        ({"OPTIMIZER": "adam", "SCHEDULER": "constant"}, ""),
        ({"OPTIMIZER": "sgd"}, "OPTIMIZATION.BETAS is not used: sgd has MOMENTUM"),
        ({"SCHEDULER": "constant"}, "BETAS, 0.8, is not used: beta1 is the first of MOMS, 0.95"),
        ({"OPTIMIZER": "adamw", "SCHEDULER": "onecycle"}, "onecycle moves beta1 between those of MOMS, 0.95 and 0.85"),
        ({"OPTIMIZER": "adam_cosineanneal"}, "BETAS, 0.8, is not used: cosine moves beta1 between those of MOMS"),
        ({"BETAS": [0.95, 0.9]}, ""),
        ({"BETAS": None}, ""),
    ],
)
def test_betas_that_nothing_uses_are_told(changes, note):
    told = unused_options(optim_cfg(**{"BETAS": [0.8, 0.9], **changes}))
    assert len(told) == bool(note) and all(note in each for each in told)


def test_an_unknown_optimizer_is_refused_with_the_legal_ones():
    with pytest.raises(ConfigError, match=r"'lion'.*adamw"):
        build_optimizer(ToyNet(), optim_cfg(OPTIMIZER="lion"))


# ---- groups


class Mixed(nn.Module):
    """Parameters wherever people put them: on a parent, in attention, in a list, tied, frozen."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(2, 4))  # directly on a module with children
        self.norm = nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.embedding = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embedding.weight
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(3))])
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.layer_norm = nn.LayerNorm(4)


LEFT_OUT = ["query", "attention.in_proj_weight", "attention.in_proj_bias"]


def group_names(model, groups):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group] for group in groups]


@GOLDEN_RUNS
def test_the_order_of_the_optimizer_state_is_the_heritages(run):
    net = ToyNet()
    groups = stepped_groups(net, optim_cfg(**INDEX[run]["optim_cfg"]))
    assert group_names(net, groups) == INDEX[run]["opt_param_order"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_trainable_parameter_is_in_exactly_one_group(optimizer):
    model = Mixed()
    groups = stepped_groups(model, optim_cfg(OPTIMIZER=optimizer))
    stepped = [parameter for group in groups for parameter in group]
    expected = [p for name, p in model.named_parameters() if not name.startswith("frozen")]
    assert sorted(map(id, stepped)) == sorted(map(id, expected))
    assert unstepped_parameters(model, groups) == []


def test_what_the_heritage_leaves_out_follows_what_it_trains():
    model = Mixed()
    trained_by_both = ["attention.out_proj.weight", "attention.out_proj.bias", "embedding.weight", "scales.0"]
    trained_by_both += ["layer_norm.weight", "layer_norm.bias"]
    norm = ["norm.weight", "norm.bias"]
    legacy, ours = (group_names(model, parameter_groups(model, legacy)) for legacy in (True, False))
    assert legacy == [trained_by_both, norm]
    assert ours == [[*trained_by_both, *LEFT_OUT[1:], LEFT_OUT[0]], norm]


def test_legacy_groups_leave_out_what_the_heritage_does_and_tell():
    model = Mixed()
    assert unstepped_parameters(model, stepped_groups(model, optim_cfg(LEGACY_PARAM_GROUPS=True))) == LEFT_OUT


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adamw"])
def test_legacy_groups_change_nothing_where_the_heritage_leaves_nothing_out(optimizer):
    model = Mixed()
    legacy = stepped_groups(model, optim_cfg(OPTIMIZER=optimizer, LEGACY_PARAM_GROUPS=True))
    assert unstepped_parameters(model, legacy) == []


@pytest.mark.parametrize("batch_norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, HostSyncBatchNorm])
def test_all_batch_norms_are_in_the_second_group_and_no_other_norm(batch_norm):
    model = nn.Sequential(batch_norm(3), nn.GroupNorm(1, 3), nn.InstanceNorm1d(3, affine=True), nn.LayerNorm(3))
    assert group_names(model, parameter_groups(model, legacy=False))[1] == ["0.weight", "0.bias"]


@ENGINES
@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.BatchNorm1d(2)], ids=["no BatchNorm", "only BatchNorm"])
def test_an_empty_group_trains_and_saves(model, engine):
    model = copy.deepcopy(model)
    trained = engine_of(model, optim_cfg(), engine)
    step_once(trained, model(torch.randn(4, 2)).sum())
    assert sorted(len(group["params"]) for group in trained.optimizer_state()["param_groups"]) == [0, 2]
    other = engine_of(copy.deepcopy(model), optim_cfg(), engine)
    other.load_optimizer_state(trained.optimizer_state())
    assert other.optimizer_state()["state"].keys() == {0, 1}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)], ids=["none", "all frozen"])
def test_a_model_without_trainable_parameters_is_refused(model, optimizer):
    with pytest.raises(TaskError, match=r"\((ReLU|Linear)\) has no trainable parameter"):
        build_optimizer(model, optim_cfg(OPTIMIZER=optimizer))


def test_legacy_groups_that_would_train_nothing_are_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
            self.weight = nn.Parameter(torch.ones(2))

    build_optimizer(Bare(), optim_cfg())
    with pytest.raises(ConfigError, match="LEGACY_PARAM_GROUPS: true leaves out every parameter"):
        build_optimizer(Bare(), optim_cfg(LEGACY_PARAM_GROUPS=True))


def test_a_parameter_that_no_module_holds_is_named_and_refused():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.extra = [nn.Parameter(torch.ones(2))]

        def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
            yield from super().named_parameters(prefix, recurse, remove_duplicate)
            if recurse:
                yield "extra.0", self.extra[0]

    with pytest.raises(ConfigError, match=r"never be trained, 1 in all: extra\.0\."):
        build_optimizer(Hidden(), optim_cfg())


# ---- schedule, pickling, states


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_set_schedule_reaches_every_group_as_python_floats(optimizer):
    built = build_optimizer(ToyNet(), optim_cfg(OPTIMIZER=optimizer))
    before = [group.get("betas", (None, None))[1] for group in built.param_groups]
    set_schedule(built, StepSettings(np.float64(0.5), np.float64(0.25), None, np.float64(0.5)))
    set_schedule(built, StepSettings(np.float64(0.125), None, None, np.float64(0.5)))
    for group, beta2 in zip(built.param_groups, before, strict=True):
        momentum = group["momentum"] if optimizer == "sgd" else group["betas"][0]
        assert (group["lr"], momentum, group["weight_decay"]) == (0.125, 0.25, 0.5)
        assert {type(group["lr"]), type(momentum), type(group["weight_decay"])} == {float}
        assert optimizer == "sgd" or group["betas"][1] == beta2


@ENGINES
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_goes_on_bit_for_bit_from_a_state_loaded_with_weights_only(optimizer, engine):
    cfg = optim_cfg(OPTIMIZER=optimizer)
    net, trained, _ = run_toy(cfg, torch.float32, engine)
    file = io.BytesIO()
    torch.save(trained.optimizer_state(), file)
    file.seek(0)
    other_net = copy.deepcopy(net)
    other = engine_of(other_net, cfg, engine)
    other.load_optimizer_state(torch.load(file, weights_only=True))
    assert_same_moments(other, trained)
    for model, stepped in ((net, trained), (other_net, other)):
        step_once(stepped, model(torch.ones(4, 2, 8, 8)).sum(), dataclasses.replace(SETTINGS, momentum=0.9))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other_net.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_whole_numbers_in_the_config_are_floats_in_the_state(optimizer):
    cfg = optim_cfg(OPTIMIZER=optimizer, LR=1, MOMS=[0, 0], MOMENTUM=0, BETAS=[0, 0], WEIGHT_DECAY=0)
    for group in build_optimizer(ToyNet(), cfg).param_groups:
        momenta = [group["momentum"]] if optimizer == "sgd" else group["betas"]
        assert {type(value) for value in (group["lr"], group["weight_decay"], *momenta)} == {float}


def heritage_state(run):
    """The optimizer_state that OpenPCDet wrote at the end of the golden run."""
    golden = np.load(TOY / f"{run}.npz")
    groups, first = [], 0
    for group, names in zip(INDEX[run]["final_groups"], INDEX[run]["opt_param_order"], strict=True):
        hyper = {key: np.float64(value) if key == "lr" else value for key, value in group.items()}
        groups.append({**hyper, "params": list(range(first, first + len(names)))})
        first += len(names)
    moments: dict = {index: {} for index in range(first)}
    for key in golden.files:
        if key.startswith("opt."):
            _, index, name = key.split(".")
            moments[int(index)][name] = torch.from_numpy(golden[key].copy())
    return {"state": moments, "param_groups": groups}


@ENGINES
@GOLDEN_RUNS
def test_an_openpcdet_state_gives_its_moments_and_none_of_its_settings(run, engine):
    cfg = optim_cfg(**INDEX[run]["optim_cfg"])
    trained, reference, _ = run_toy(cfg, torch.float64)
    built = engine_of(copy.deepcopy(trained), cfg, engine)
    own = copy.deepcopy(built.optimizer_state()["param_groups"])
    built.load_optimizer_state(heritage_state(run))
    groups = built.optimizer_state()["param_groups"]
    assert groups == own  # decoupled weight decay 0.01 above all: theirs says 0
    assert {type(group["lr"]) for group in groups} == {float}
    assert_same_moments(built, reference, atol=1e-12)


@ENGINES
def test_an_imported_state_is_a_copy(engine):
    net, trained, _ = run_toy(optim_cfg(), torch.float32, engine)
    state = trained.optimizer_state()
    before = copy.deepcopy(state)
    other_net = copy.deepcopy(net)
    other = engine_of(other_net, optim_cfg(), engine)
    other.load_optimizer_state(state)
    step_once(other, other_net(torch.ones(4, 2, 8, 8)).sum())
    for index, moments in before["state"].items():
        assert all(torch.equal(value, state["state"][index][name]) for name, value in moments.items())


@ENGINES
def test_a_state_saved_before_the_first_step_has_no_moments(engine):
    other = engine_of(ToyNet(), optim_cfg(), engine)
    other.load_optimizer_state(build_optimizer(ToyNet(), optim_cfg()).state_dict())
    assert other.optimizer_state()["state"] == {}


def legacy_state_of(model):
    return build_optimizer(model, optim_cfg(LEGACY_PARAM_GROUPS=True)).state_dict()


def state_of_all(model):
    return build_optimizer(model, optim_cfg(OPTIMIZER="adamw")).state_dict()


def wider_state():
    state = heritage_state("adam_onecycle_clip10_f64")
    state["state"][1]["exp_avg"] = torch.zeros(8, 7, 3, 3)
    return state


def unlisted_state():
    state = heritage_state("adam_onecycle_clip10_f64")
    state["state"][8] = state["state"][7]
    return state


@ENGINES
@pytest.mark.parametrize(
    ("model", "state_of", "message"),  # made when asked for: torch's optimizers import its compiler
    [
        (ToyNet(), lambda: heritage_state("sgd_clip10_f64"), "state of SGD, but this run steps with Adam"),
        (
            Mixed(),
            lambda: legacy_state_of(Mixed()),
            r"of \[6, 2\] parameters.*steps \[9, 2\].*LEGACY_PARAM_GROUPS: true",
        ),
        (ToyNet(), lambda: state_of_all(ToyNet()), r"of \[8\].*steps \[4, 4\]"),
        (ToyNet(), wider_state, r"exp_avg of parameter 1 is \(8, 7, 3, 3\).*is \(8, 6, 3, 3\)"),
        (ToyNet(), unlisted_state, "moments of parameter 8, not listed"),
        (ToyNet(), lambda: {"state": {}}, r"found the keys \['state'\]"),
    ],
    ids=["kind", "legacy", "groups", "shape", "unlisted", "no state"],
)
def test_a_state_of_something_else_is_refused_and_nothing_changes(model, state_of, message, engine):
    built = engine_of(copy.deepcopy(model), optim_cfg(), engine)
    before = copy.deepcopy(built.optimizer_state())
    with pytest.raises(CheckpointError, match=message):
        built.load_optimizer_state(state_of())
    assert built.optimizer_state() == before


def assert_same_moments(a, b, atol=0.0):
    ours, theirs = a.optimizer_state()["state"], b.optimizer_state()["state"]
    assert ours.keys() == theirs.keys()
    for index, moments in ours.items():
        assert moments.keys() == theirs[index].keys()
        for name, value in moments.items():
            torch.testing.assert_close(value, theirs[index][name], rtol=0, atol=atol)
