"""Optimizers: OpenPCDet's own numbers (tests/golden/toy), groups, pickling, states of other makers."""

import copy
import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from raytrain.clip import clip_gradients
from raytrain.errors import CheckpointError, ConfigError, TaskError
from raytrain.optim import (
    build_optimizer,
    import_optimizer_state,
    parameter_groups,
    set_schedule,
    stepped_parameters,
    unstepped_parameters,
)
from raytrain.schedule import build_schedule
from raytrain.sync_bn import HostSyncBatchNorm

TOY = Path(__file__).parent / "golden" / "toy"
INDEX = json.loads((TOY / "index.json").read_text())
OPTIMIZERS = ["adam", "sgd", "adamw", "adam_onecycle", "adam_cosineanneal"]


def optim_cfg(**changes):
    defaults = {
        "OPTIMIZER": "adam_onecycle",
        "SCHEDULER": None,
        "LR": 0.01,
        "WEIGHT_DECAY": 0.01,
        "MOMENTUM": 0.9,
        "MOMS": [0.95, 0.85],
        "BETAS": None,
        "PCT_START": 0.4,
        "DIV_FACTOR": 10,
        "DECAY_STEP_LIST": [1, 2],
        "LR_DECAY": 0.1,
        "LR_CLIP": 5e-4,
        "LR_WARMUP": False,
        "WARMUP_EPOCH": 1,
        "WARMUP_ITER": 5,
        "GRAD_NORM_CLIP": 10,
        "LEGACY_PARAM_GROUPS": False,
    }
    return SimpleNamespace(**{**defaults, **changes})


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


def run_toy(cfg, dtype):
    """Three epochs of the seven batches, as the loop does it.   Returns net, optimizer and each step's numbers."""
    data = np.load(TOY / "data.npz")
    x, y = torch.from_numpy(data["x"]).to(dtype), torch.from_numpy(data["y"])
    net = toy_net(dtype)
    optimizer = build_optimizer(net, cfg)
    schedule = build_schedule(cfg, steps_per_epoch=7, num_epochs=3)
    seen = {"lr": [], "mom": [], "loss": [], "gnorm": [], "weights": []}
    for step in range(21):
        set_schedule(optimizer, schedule.lr(step), schedule.momentum(step))
        optimizer.zero_grad()
        loss = 8 * nn.functional.cross_entropy(net(x[step % 7]), y[step % 7])
        loss.backward()
        norm = clip_gradients(stepped_parameters(optimizer), cfg.GRAD_NORM_CLIP)
        optimizer.step()
        group = optimizer.param_groups[0]
        seen["lr"].append([group["lr"] for group in optimizer.param_groups])
        seen["mom"].append(group["betas"][0] if "betas" in group else group["momentum"])
        seen["loss"].append(loss.item())
        seen["gnorm"].append(norm.item())
        seen["weights"].append(torch.cat([p.detach().flatten() for p in net.parameters()]).double().numpy())
    return net, optimizer, {key: np.array(values) for key, values in seen.items()}


GOLDEN_RUNS = pytest.mark.parametrize("run", ["adam_onecycle_clip10_f64", "sgd_clip10_f64"])


@GOLDEN_RUNS
def test_a_run_in_f64_is_the_heritages_to_1e_12(run):
    golden = np.load(TOY / f"{run}.npz")
    net, optimizer, seen = run_toy(optim_cfg(**INDEX[run]["optim_cfg"]), torch.float64)
    assert np.array_equal(seen["lr"], golden["lr"])
    assert np.array_equal(seen["mom"], golden["mom"])
    for key in ("loss", "gnorm", "weights"):
        np.testing.assert_allclose(seen[key], golden[key], rtol=0, atol=1e-12, err_msg=key)
    for name, value in net.state_dict().items():
        np.testing.assert_allclose(value, golden[f"final.{name}"], rtol=0, atol=1e-12, err_msg=name)
    for index, moments in optimizer.state_dict()["state"].items():
        for key, value in moments.items():
            np.testing.assert_allclose(value, golden[f"opt.{index}.{key}"], rtol=0, atol=1e-12)


@GOLDEN_RUNS
def test_a_run_in_f32_stays_at_the_heritages_to_rounding(run):
    golden = np.load(TOY / f"{run}.npz")
    _, _, seen = run_toy(optim_cfg(**INDEX[run]["optim_cfg"]), torch.float32)  # measured: 5e-7
    assert np.array_equal(seen["lr"], golden["lr"])
    np.testing.assert_allclose(seen["weights"], golden["weights"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adam_cosineanneal"])
def test_the_other_optimizers_do_what_plain_torch_does(optimizer):
    betas = (0.9, 0.99) if optimizer == "adam_cosineanneal" else (0.9, 0.999)
    torch_class = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
    ours, theirs = toy_net(torch.float64), toy_net(torch.float64)
    cfg = optim_cfg(OPTIMIZER=optimizer, MOMS=[0.9, 0.8], WEIGHT_DECAY=0.1)
    pairs = [
        (ours, build_optimizer(ours, cfg)),
        (theirs, torch_class(theirs.parameters(), lr=0.01, betas=betas, weight_decay=0.1)),
    ]
    x = torch.from_numpy(np.load(TOY / "data.npz")["x"]).double()
    for net, stepper in pairs:
        for batch in x:
            stepper.zero_grad()
            net(batch).square().sum().backward()
            stepper.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_betas_are_for_adam_and_adamw(optimizer):
    group = build_optimizer(ToyNet(), optim_cfg(OPTIMIZER=optimizer, BETAS=[0.8, 0.95])).param_groups[0]
    assert group["betas"] == (0.8, 0.95)


@pytest.mark.parametrize(("betas", "expected"), [(None, (0.95, 0.99)), ([0.9, 0.999], (0.95, 0.999))])
def test_moms_overwrite_the_first_of_betas_in_adam_onecycle(betas, expected):
    for group in build_optimizer(ToyNet(), optim_cfg(BETAS=betas)).param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == (expected, 1e-8, 0.01)


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
    optimizer = build_optimizer(net, optim_cfg(**INDEX[run]["optim_cfg"]))
    groups = [group["params"] for group in optimizer.param_groups]
    assert group_names(net, groups) == INDEX[run]["opt_param_order"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_trainable_parameter_is_in_exactly_one_group(optimizer):
    model = Mixed()
    optimizer = build_optimizer(model, optim_cfg(OPTIMIZER=optimizer))
    stepped = stepped_parameters(optimizer)
    expected = [p for name, p in model.named_parameters() if not name.startswith("frozen")]
    assert sorted(map(id, stepped)) == sorted(map(id, expected))
    assert unstepped_parameters(model, optimizer) == []


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
    assert unstepped_parameters(model, build_optimizer(model, optim_cfg(LEGACY_PARAM_GROUPS=True))) == LEFT_OUT


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adamw"])
def test_legacy_groups_change_nothing_where_the_heritage_leaves_nothing_out(optimizer):
    model = Mixed()
    legacy = build_optimizer(model, optim_cfg(OPTIMIZER=optimizer, LEGACY_PARAM_GROUPS=True))
    assert unstepped_parameters(model, legacy) == []


@pytest.mark.parametrize("batch_norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, HostSyncBatchNorm])
def test_all_batch_norms_are_in_the_second_group_and_no_other_norm(batch_norm):
    model = nn.Sequential(batch_norm(3), nn.GroupNorm(1, 3), nn.InstanceNorm1d(3, affine=True), nn.LayerNorm(3))
    assert group_names(model, parameter_groups(model, legacy=False))[1] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.BatchNorm1d(2)], ids=["no BatchNorm", "only BatchNorm"])
def test_an_empty_group_trains_and_saves(model):
    optimizer = build_optimizer(model, optim_cfg())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    assert sorted(len(group["params"]) for group in optimizer.param_groups) == [0, 2]
    other = build_optimizer(copy.deepcopy(model), optim_cfg())
    import_optimizer_state(other, optimizer.state_dict())
    assert other.state_dict()["state"].keys() == {0, 1}


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
    set_schedule(built, np.float64(0.5), np.float64(0.25))
    set_schedule(built, np.float64(0.125), None)
    for group, beta2 in zip(built.param_groups, before, strict=True):
        momentum = group["momentum"] if optimizer == "sgd" else group["betas"][0]
        assert (group["lr"], momentum) == (0.125, 0.25)
        assert {type(group["lr"]), type(momentum)} == {float}
        assert optimizer == "sgd" or group["betas"][1] == beta2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_survives_pickling_and_deepcopy(optimizer):
    _, built, _ = run_toy(optim_cfg(OPTIMIZER=optimizer), torch.float32)
    for other in (pickle.loads(pickle.dumps(built)), copy.deepcopy(built)):
        assert type(other) is type(built)
        assert_same_moments(other, built)
        assert other.state_dict()["param_groups"] == built.state_dict()["param_groups"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_goes_on_bit_for_bit_from_a_state_loaded_with_weights_only(optimizer):
    cfg = optim_cfg(OPTIMIZER=optimizer)
    net, built, _ = run_toy(cfg, torch.float32)
    file = io.BytesIO()
    torch.save(built.state_dict(), file)
    file.seek(0)
    other_net = copy.deepcopy(net)
    other = build_optimizer(other_net, cfg)
    import_optimizer_state(other, torch.load(file, weights_only=True))
    assert_same_moments(other, built)
    for model, stepper in ((net, built), (other_net, other)):
        set_schedule(stepper, 0.01, 0.9)
        stepper.zero_grad()
        model(torch.ones(4, 2, 8, 8)).sum().backward()
        stepper.step()
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


@GOLDEN_RUNS
def test_an_openpcdet_state_gives_its_moments_and_none_of_its_settings(run):
    cfg = optim_cfg(**INDEX[run]["optim_cfg"])
    trained, reference, _ = run_toy(cfg, torch.float64)
    built = build_optimizer(copy.deepcopy(trained), cfg)
    own = copy.deepcopy(built.state_dict()["param_groups"])
    import_optimizer_state(built, heritage_state(run))
    assert built.state_dict()["param_groups"] == own  # decoupled weight decay 0.01 above all: theirs says 0
    assert {type(group["lr"]) for group in built.param_groups} == {float}
    assert_same_moments(built, reference, atol=1e-12)


def test_an_imported_state_is_a_copy():
    net, built, _ = run_toy(optim_cfg(), torch.float32)
    state = built.state_dict()
    before = copy.deepcopy(state)
    other = build_optimizer(copy.deepcopy(net), optim_cfg())
    import_optimizer_state(other, state)
    for parameter in stepped_parameters(other):
        parameter.grad = torch.ones_like(parameter)
    other.step()
    for index, moments in before["state"].items():
        assert all(torch.equal(value, state["state"][index][name]) for name, value in moments.items())


def test_a_state_saved_before_the_first_step_has_no_moments():
    other = build_optimizer(ToyNet(), optim_cfg())
    import_optimizer_state(other, build_optimizer(ToyNet(), optim_cfg()).state_dict())
    assert other.state_dict()["state"] == {}


def legacy_state_of(model):
    return build_optimizer(model, optim_cfg(LEGACY_PARAM_GROUPS=True)).state_dict()


def wider_state():
    state = heritage_state("adam_onecycle_clip10_f64")
    state["state"][1]["exp_avg"] = torch.zeros(8, 7, 3, 3)
    return state


def unlisted_state():
    state = heritage_state("adam_onecycle_clip10_f64")
    state["state"][8] = state["state"][7]
    return state


@pytest.mark.parametrize(
    ("model", "state", "message"),
    [
        (ToyNet(), heritage_state("sgd_clip10_f64"), "state of SGD, but this run steps with Adam"),
        (Mixed(), legacy_state_of(Mixed()), r"of \[6, 2\] parameters.*steps \[9, 2\].*LEGACY_PARAM_GROUPS: true"),
        (ToyNet(), build_optimizer(ToyNet(), optim_cfg(OPTIMIZER="adamw")).state_dict(), r"of \[8\].*steps \[4, 4\]"),
        (ToyNet(), wider_state(), r"exp_avg of parameter 1 is \(8, 7, 3, 3\).*is \(8, 6, 3, 3\)"),
        (ToyNet(), unlisted_state(), "moments of parameter 8, not listed"),
        (ToyNet(), {"state": {}}, r"found the keys \['state'\]"),
    ],
    ids=["kind", "legacy", "groups", "shape", "unlisted", "no state"],
)
def test_a_state_of_something_else_is_refused_and_nothing_changes(model, state, message):
    optimizer = build_optimizer(model, optim_cfg())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=message):
        import_optimizer_state(optimizer, state)
    assert optimizer.state_dict() == before


def assert_same_moments(a, b, atol=0.0):
    ours, theirs = a.state_dict()["state"], b.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for index, moments in ours.items():
        assert moments.keys() == theirs[index].keys()
        for name, value in moments.items():
            torch.testing.assert_close(value, theirs[index][name], rtol=0, atol=atol)
