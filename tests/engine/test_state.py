"""The state of a run: saved and restored to the bit, also from OpenPCDet's files, with every difference named."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optimization import settings
from processes import Pair
from torch import nn

from raytrain.config.load import with_overrides
from raytrain.config.sections import Config
from raytrain.engine.state import (
    RunState,
    build_run,
    load_model_state,
    manifest_of,
    payload_of,
    restore,
    restore_heritage,
)
from raytrain.engine.world import World
from raytrain.errors import CheckpointError, ConfigError, TaskError
from raytrain.progress import Plan, Progress
from raytrain.storage.state_file import load_weights_file
from raytrain.task import Task

PLAN = Plan(num_samples=22, batch_size=4, virtual_workers=1, accumulate=1, num_epochs=5)  # 6 steps an epoch


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(6, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class NetTask(Task):
    def build_model(self, dataset: Any) -> Any:
        return Net(self.cfg.MODEL.get("CLASSES", 3))


def config(**optim: Any) -> Config:
    optim = {"BATCH_SIZE_PER_GPU": 4, "NUM_EPOCHS": 5, **optim}
    return Config.model_validate({"TASK": "a:B", "SEED": 3, "OPTIMIZATION": optim})


def run_of(cfg: Config | None = None, world: World | None = None) -> RunState:
    cfg = cfg or config()
    return build_run(cfg, NetTask(cfg), None, PLAN, world or World())


def trained(run: RunState, steps: int) -> RunState:
    """As loop.train_step, on batches of noise."""
    for _ in range(steps):
        at = run.progress.step
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(at))
        run.engine.zero_grad()
        with run.engine.virtual_worker(), run.engine.precision.autocast():
            torch.manual_seed(at)
            loss = run.model(x).float().square().mean()
        run.engine.backward(loss, 1.0)
        run.engine.step(run.schedule.at(at), ())
        run.progress = run.plan.advanced(run.progress, 4)
    return run


def through_a_file(payload: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(found: Any, expected: Any) -> None:
    """To the bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    else:
        assert found == expected


# Building


def test_a_model_starts_from_the_same_weights_on_every_process_and_for_every_seed_its_own() -> None:
    torch.manual_seed(123)
    first = run_of()
    torch.rand(77)
    again = run_of(with_overrides(config(), ["SCALE.REDUCTION", "collective"]), World(1, 2, 4))
    assert_same(again.model.state_dict(), first.model.state_dict())
    other = run_of(Config.model_validate({**config().to_tree(), "SEED": 4}))
    assert not torch.equal(other.model.head.weight, first.model.head.weight)


def test_what_is_no_model_is_refused() -> None:
    class Wrong(NetTask):
        def build_model(self, dataset: Any) -> Any:
            return {"model": Net()}

    with pytest.raises(TaskError, match=r"Wrong.build_model\(dataset\) gave dict; it must give a torch.nn.Module"):
        build_run(config(), Wrong(config()), None, PLAN, World())


def test_buffers_without_a_shape_are_refused_by_name() -> None:
    class Lazy(NetTask):
        def build_model(self, dataset: Any) -> nn.Module:
            return nn.Sequential(nn.Linear(4, 3), nn.LazyBatchNorm1d(affine=False))

    with pytest.raises(TaskError, match=r"no shape yet \(1\.running_mean, 1\.running_var\)"):
        build_run(config(), Lazy(config()), None, PLAN, World())


def test_synchronised_batchnorm_needs_a_process_for_each_virtual_worker() -> None:
    with pytest.raises((TaskError, ConfigError), match="4 virtual workers on 2 processes"):
        run_of(config(SYNC_BN=True), World(0, 2, 4))
    assert isinstance(run_of(config(SYNC_BN=True), World()).model.body[1], nn.BatchNorm1d)  # alone: nothing to do


def synchronised(rank: int) -> dict[str, torch.Tensor]:
    """Running statistics after a step in which the samples of the two processes differ by 10."""
    run = run_of(config(SYNC_BN=True), World(rank, 2, 2))
    run.engine.zero_grad()
    with run.engine.virtual_worker():
        run.engine.backward(run.model(torch.full((4, 4), 10.0 * rank)).square().mean(), 0.5)
    run.engine.step(settings(0.0), ())
    return {"mean": run.model.body[1].running_mean, "var": run.model.body[1].running_var}


def test_synchronised_batchnorm_sees_the_samples_of_all_processes(pair: Pair) -> None:
    first, second = pair.run(synchronised)
    assert_same(first, second)
    weight = run_of().model.body[0].weight.detach().sum(1)  # the outputs of the two processes differ by 10 times this
    torch.testing.assert_close(first["var"], 0.9 + 0.1 * (10 * weight) ** 2 / 4 * 8 / 7)


# Our own files


@pytest.mark.parametrize(
    "optim",
    [
        {},
        {"OPTIMIZER": "sgd"},
        {"OPTIMIZER": "adamw", "SCHEDULER": "cosine"},
        {"USE_AMP": True, "LOSS_SCALE_FP16": 64.0},
        {"USE_AMP": True, "AMP_DTYPE": "bf16"},
    ],
    ids=str,
)
def test_restoring_is_exact_to_the_bit_and_so_is_what_follows(optim: dict[str, Any]) -> None:
    run = trained(run_of(config(**optim)), 8)
    run.best = {"epoch": 1, "step": 6, "metrics": {"accuracy": 0.5}}
    payload = through_a_file(payload_of(run))  # weights_only
    other = run_of(config(**optim))
    restore(other, payload, "there")
    assert other.progress == Progress(1, 8, 8)
    found, expected = payload_of(other), payload_of(run)
    for part in (found, expected):
        part["optimizer_state"] = part["optimizer_state"]["state"]  # its options are the config's and the schedule's
    assert_same(found, expected)
    trained(run, 7), trained(other, 7)
    assert_same(payload_of(other), payload_of(run))


def test_a_payload_has_openpcdets_keys_and_reads_as_one_of_its_files() -> None:
    run = trained(run_of(), 6)
    payload = through_a_file(payload_of(run))
    assert {"epoch", "it", "model_state", "optimizer_state", "version", "raytrain"} == set(payload)
    assert (payload["epoch"], payload["it"]) == (1, 6)
    assert [len(g["params"]) for g in payload["optimizer_state"]["param_groups"]] == [4, 2]
    assert all(type(g["lr"]) is float for g in payload["optimizer_state"]["param_groups"])  # numpy's do not load
    other = run_of()
    assert restore_heritage(other, payload, "there") == []
    assert other.progress == run.progress
    assert_same(other.engine.optimizer_state()["state"], run.engine.optimizer_state()["state"])


def test_a_manifest_says_how_the_data_was_cut() -> None:
    cfg = with_overrides(config(), ["SCALE.REDUCTION", "collective"])
    run = run_of(cfg, World(1, 2, 4))
    manifest = manifest_of(run, {"a": 1.0})
    assert manifest.world == {
        "hardware": run.hardware,
        "num_workers": 2,
        "virtual_workers": 1,
        "num_samples": 22,
        "batch_size": 4,
        "accumulate": 1,
        "last": "keep",
        "engine": "flat",
        "exact": True,
        "reduction": "ordered collective",
    }
    assert (manifest.seed, manifest.metrics, manifest.config["OPTIMIZATION"]["NUM_EPOCHS"]) == (3, {"a": 1.0}, 5)


# OpenPCDet's files


def heritage_file(folder: Path, epoch: int, it: int, **changes: Any) -> Path:
    """What its save_checkpoint writes: legacy format, numpy scalars in the groups, global_step among the weights."""
    run = trained(run_of(), 4)
    state = run.engine.optimizer_state()
    for group in state["param_groups"]:
        group.update(lr=np.float64(group["lr"]), betas=(np.float64(0.9), 0.99), weight_decay=0)
        for newer in ("decoupled_weight_decay",):
            group.pop(newer, None)
    payload = {
        "epoch": epoch,
        "it": it,
        "model_state": {"global_step": torch.tensor([it]), **run.model.state_dict()},
        "optimizer_state": state,
        "version": "pcdet+0.6.0+8cacccec",
        **changes,
    }
    path = folder / "checkpoint.pth"
    torch.save(payload, path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize(
    ("epoch", "it", "progress"),
    [
        (2, 12, Progress(2, 0, 12)),  # checkpoint_epoch_2.pth
        (2, 15, Progress(2, 12, 15)),  # latest_model.pth in mid-epoch
        (2, 18, Progress(3, 0, 18)),  # latest_model.pth of the last iteration: OpenPCDet repeats the epoch
        (0, 0, Progress(0, 0, 0)),
        (5, 30, Progress(5, 0, 30)),
    ],
)
def test_an_openpcdet_checkpoint_is_taken_up_at_its_place(
    epoch: int, it: int, progress: Progress, tmp_path: Path
) -> None:
    run = run_of()
    payload = load_weights_file(heritage_file(tmp_path, epoch, it))
    assert restore_heritage(run, payload, "there") == []
    assert run.progress == progress
    expected = trained(run_of(), 4)
    assert_same(run.model.state_dict(), expected.model.state_dict())
    assert_same(run.engine.optimizer_state()["state"], expected.engine.optimizer_state()["state"])
    group = run.engine.optimizer_state()["param_groups"][0]
    assert (type(group["lr"]), group["weight_decay"]) == (float, 0.01)  # this run's own decay
    trained(run, 1)


def test_an_openpcdet_checkpoint_of_another_batch_size_goes_on_at_its_epoch_and_says_so(tmp_path: Path) -> None:
    run = run_of()
    notes = restore_heritage(run, load_weights_file(heritage_file(tmp_path, 2, 40)), "there")
    assert run.progress == Progress(2, 0, 12)
    assert len(notes) == 1 and "its 40 iterations are not 2 epochs of 6 steps" in notes[0]


def test_an_openpcdet_checkpoint_without_optimizer_gives_its_weights_and_says_so(tmp_path: Path) -> None:
    run = run_of()
    notes = restore_heritage(run, load_weights_file(heritage_file(tmp_path, 1, 6, optimizer_state=None)), "there")
    assert notes == ["it holds no optimizer state: moments start at zero"]


# Weights that do not fit


def test_a_strict_load_names_every_difference() -> None:
    state = dict(Net(classes=5).state_dict())
    del state["body.0.bias"]
    state["neck.weight"] = torch.ones(1)
    with pytest.raises(CheckpointError) as raised:
        load_model_state(Net(), state, "here.pth")
    text = str(raised.value)
    assert text.startswith(
        "here.pth: its model_state does not fit this model: missing body.0.bias; unknown neck.weight"
    )
    assert "head.weight has shape (5, 6), the model (3, 6)" in text and "--pretrained_model" in text


def test_a_long_list_of_differences_is_cut() -> None:
    many = {f"layer{i}.weight": torch.ones(1) for i in range(30)}
    with pytest.raises(CheckpointError, match=r"unknown layer\d+.weight; and 29 more\."):
        load_model_state(Net(), {**many}, "here.pth")


def test_nothing_of_a_checkpoint_that_does_not_fit_is_taken() -> None:
    run = run_of()
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    payload = payload_of(trained(run_of(), 3))
    payload["model_state"] = Net(classes=5).state_dict()
    with pytest.raises(CheckpointError):
        restore(run, payload, "there")
    assert_same(dict(run.model.state_dict()), before)
    assert run.progress == Progress()


class WithExtra(Net):
    """A module with state that is no tensor, as some libraries have."""

    def get_extra_state(self) -> Any:
        return {"calls": 7}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


def test_modules_with_state_that_is_no_tensor_are_restored_too() -> None:
    model = WithExtra()
    load_model_state(model, WithExtra().state_dict(), "there")
    assert model.calls == 7
