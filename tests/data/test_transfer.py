"""Batches come to the device with the same numbers, in the memory format that was asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import INDEX, config, run_until, saved_state, train
from tasks_for_units import GoldenToyTask

from raytrain.batch import channels_last
from raytrain.config.load import with_overrides
from raytrain.config.sections import Config
from raytrain.data.transfer import DeviceTransfer
from raytrain.engine.state import build_run
from raytrain.engine.world import World
from raytrain.task import Task
from raytrain.training.worker import plan_of

CPU = torch.device("cpu")
SGD, ADAM = INDEX["sgd_clip10_f64"]["optim_cfg"], INDEX["adam_onecycle_clip10_f64"]["optim_cfg"]


@dataclasses.dataclass
class Scan:
    image: torch.Tensor
    name: str


def test_images_become_channels_last_wherever_they_are_in_a_batch_and_nothing_else_changes() -> None:
    image = torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5)
    batch = {"a": (image, torch.ones(2, 3)), "b": [Scan(image.half(), "x")], "labels": image.long(), "n": 2}
    brought = DeviceTransfer(Task(None), CPU, channels_last=True).to_device(batch)  # type: ignore[arg-type]
    for found in (brought["a"][0], brought["b"][0].image):
        assert found.is_contiguous(memory_format=torch.channels_last) and torch.equal(found.float(), image)
    assert brought["labels"].is_contiguous() and brought["a"][1].is_contiguous()
    assert (brought["n"], brought["b"][0].name) == (2, "x")


def test_without_being_asked_a_batch_stays_as_the_task_made_it() -> None:
    image = torch.rand(2, 3, 4, 5)
    assert DeviceTransfer(Task(None), CPU).to_device([image])[0] is image  # type: ignore[arg-type]


def test_what_has_no_single_memory_is_left_alone() -> None:
    sparse = torch.eye(4).view(1, 1, 4, 4).to_sparse()
    assert channels_last(sparse) is sparse


def test_a_to_device_of_the_tasks_own_is_what_brings_batches() -> None:
    class Doubling(Task):
        def to_device(self, batch: Any, device: torch.device) -> Any:
            return batch * 2

    assert DeviceTransfer(Doubling(None), CPU).to_device(torch.ones(2)).tolist() == [2, 2]  # type: ignore[arg-type]


def toy(folder: Path, optim: dict[str, Any], **changes: Any) -> Config:
    return config(folder, "GoldenToyTask", {**optim, **changes}, LOADER={"WORKERS": 0, "SHUFFLE": False})


@pytest.mark.parametrize("engine", ["flat", "ddp"])
@pytest.mark.parametrize("optim", [SGD, ADAM])
def test_channels_last_trains_to_the_same_weights(optim: dict[str, Any], engine: str, tmp_path: Path) -> None:
    plain = saved_state(train(toy(tmp_path / "plain", optim, ENGINE=engine)).checkpoint)
    last = saved_state(train(toy(tmp_path / "last", optim, ENGINE=engine, CHANNELS_LAST=True)).checkpoint)
    torch.testing.assert_close(last, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", ["flat", "ddp"])
@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_goes_on_in_the_other_memory_format(first: bool, engine: str, tmp_path: Path) -> None:
    whole = saved_state(train(toy(tmp_path / "whole", ADAM, ENGINE=engine)).checkpoint)
    cfg = toy(tmp_path / "parts", ADAM, ENGINE=engine, CHANNELS_LAST=first)
    run_until(cfg, stop_at=5)
    result = train(with_overrides(cfg, ["OPTIMIZATION.CHANNELS_LAST", str(not first).lower()]))
    torch.testing.assert_close(saved_state(result.checkpoint), whole, rtol=0, atol=1e-12)


def test_the_model_is_channels_last_also_where_it_has_three_dimensional_convolutions() -> None:
    class Mixed(GoldenToyTask):
        def build_model(self, dataset: Any) -> torch.nn.Module:
            return torch.nn.ModuleList([torch.nn.Conv2d(3, 4, 3), torch.nn.Conv3d(3, 4, 3)])

    cfg = toy(Path("unused"), SGD, CHANNELS_LAST=True)
    run = build_run(cfg, Mixed(cfg), None, plan_of(cfg, 8, World()), World())
    flat, deep = (dict(run.model.named_parameters())[name] for name in ("0.weight", "1.weight"))
    assert flat.is_contiguous(memory_format=torch.channels_last) and deep.is_contiguous()
