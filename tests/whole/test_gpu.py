"""What makes a GPU fast changes no number beyond rounding and makes no host wait. `pytest -m gpu`: all that needs one.

That is skipped where there is none, and says so; what can is run on the CPU as well.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from compiler import compiler_files_are_ours
from small_runs import config, journal, notes, run_until, saved_state, train

from raytrain.config.sections import Config
from raytrain.data.feed import Feed
from raytrain.data.transfer import DeviceTransfer
from raytrain.engine.determinism import prepare_torch, torch_put_back
from raytrain.engine.precision import fp32_precisions
from raytrain.engine.state import RunState, build_run
from raytrain.engine.world import World
from raytrain.launch import Result
from raytrain.task import Task, load_task_class
from raytrain.training import loop
from raytrain.training.worker import build_datasets, plan_of

__all__ = ["compiler_files_are_ours"]  # a fixture for every test here

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
SGD = {"OPTIMIZER": "sgd", "LR": 0.01, "BATCH_SIZE_PER_GPU": 5}


def cfg_of(folder: Path, device: str, task: str = "ImagesTask", optim: dict[str, Any] | None = None) -> Config:
    scale = {"NUM_WORKERS": 0, "USE_GPU": device == "cuda"}
    return config(folder, task, {**SGD, **(optim or {})}, SCALE=scale, LOADER={"WORKERS": 1})


def losses(result: Result) -> list[float]:
    return [step["loss"] for step in journal(result.run_dir, "step")]


# The same numbers


@DEVICES
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_trains_to_the_same_weights_within_its_rounding(
    dtype: str, device: str, tmp_path: Path
) -> None:
    full = train(cfg_of(tmp_path / "full", device))
    mixed = train(cfg_of(tmp_path / "mixed", device, optim={"USE_AMP": True, "AMP_DTYPE": dtype}))
    assert losses(mixed)[1:] == pytest.approx(losses(full)[1:], abs=0.05)
    torch.testing.assert_close(saved_state(mixed.checkpoint), saved_state(full.checkpoint), rtol=0.05, atol=0.02)


@DEVICES
@pytest.mark.parametrize("accumulate", [1, 2])
def test_channels_last_trains_to_the_same_weights_to_rounding(accumulate: int, device: str, tmp_path: Path) -> None:
    plain = train(cfg_of(tmp_path / "plain", device, optim={"ACCUMULATE": accumulate}))
    last = train(cfg_of(tmp_path / "last", device, optim={"ACCUMULATE": accumulate, "CHANNELS_LAST": True}))
    torch.testing.assert_close(saved_state(last.checkpoint), saved_state(plain.checkpoint), rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("optim", [{}, {"CUDA_GRAPHS": True}, {"CUDA_GRAPHS": True, "CHANNELS_LAST": True}])
@pytest.mark.parametrize("engine", ["flat", "ddp"])
def test_compiled_with_and_without_cuda_graphs_trains_to_the_eager_weights(
    optim: dict[str, Any], engine: str, tmp_path: Path
) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    eager = train(cfg_of(tmp_path / "eager", "cuda", optim={"ENGINE": engine}))
    compiled = train(cfg_of(tmp_path / "compiled", "cuda", optim={"ENGINE": engine, "COMPILE": True, **optim}))
    assert notes(compiled.run_dir) == [] and counters["inductor"]["cudagraph_skips"] == 0
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)
    torch.testing.assert_close(saved_state(compiled.checkpoint), saved_state(eager.checkpoint), rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("optim", [{}, {"COMPILE": True}, {"COMPILE": True, "CUDA_GRAPHS": True}])
def test_a_stopped_run_on_a_gpu_ends_with_the_same_bits(optim: dict[str, Any], tmp_path: Path) -> None:
    """PointsTask has dropout: its numbers are those of the step, also where a graph replays them."""
    whole = train(cfg_of(tmp_path / "whole", "cuda", "PointsTask", optim))
    cfg = cfg_of(tmp_path / "parts", "cuda", "PointsTask", optim)
    run_until(cfg, stop_at=4, device=torch.device("cuda"))
    resumed = train(cfg)
    assert losses(resumed) == losses(whole)
    torch.testing.assert_close(saved_state(resumed.checkpoint), saved_state(whole.checkpoint), rtol=0, atol=0)


@needs_gpu
def test_several_micro_batches_a_step_are_compiled_without_graphs_and_it_is_said(tmp_path: Path) -> None:
    optim = {"ACCUMULATE": 2, "COMPILE": True, "CUDA_GRAPHS": True}
    (told,) = notes(train(cfg_of(tmp_path, "cuda", optim=optim)).run_dir)
    assert told.startswith("CUDA_GRAPHS is given up, the model is compiled without: this process adds up 2")


# TF32


@needs_gpu
@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_what_the_config_says_while_a_run_lasts(allowed: bool, tmp_path: Path) -> None:
    before = fp32_precisions()
    result = train(cfg_of(tmp_path, "cuda", "FlagsTask", {"TF32": allowed}))
    assert {step["terms"]["tf32"] for step in journal(result.run_dir, "step")} == {2.0 * allowed}
    assert fp32_precisions() == before


@needs_gpu
def test_without_tf32_a_product_is_that_of_f32(tmp_path: Path) -> None:
    a = torch.randn(256, 256, device="cuda")
    exact = a.double() @ a.double()
    with torch_put_back():
        prepare_torch(cfg_of(tmp_path, "cuda"), a.device)
        torch.testing.assert_close((a @ a).double(), exact, rtol=0, atol=1e-4)  # TF32 is off by 1e-2


# Batches on a stream of their own


@DEVICES
def test_batches_that_come_beside_the_computation_are_whole(device: str) -> None:
    """The computation lags behind, so that memory given back too early would be written over."""
    side = DeviceTransfer(Task(None), torch.device(device))  # type: ignore[arg-type]
    sums, expected = [], []
    for i in range(50):
        batch = {"x": torch.full((1 << 18,), float(i))}
        if device == "cuda":
            batch["x"] = batch["x"].pin_memory()
            torch.cuda._sleep(1_000_000)
        sums.append(side.to_device(batch)["x"].double().sum())
        expected.append(float(i) * (1 << 18))
    assert [float(each) for each in sums] == expected


@DEVICES
def test_a_run_whose_batches_come_beside_it_is_to_the_bit_the_run_whose_batches_do_not(
    device: str, tmp_path: Path
) -> None:
    beside = train(cfg_of(tmp_path / "beside", device))
    in_line = train(cfg_of(tmp_path / "in_line", device, "OwnDeliveryTask"))
    assert losses(beside) == losses(in_line)
    torch.testing.assert_close(saved_state(beside.checkpoint), saved_state(in_line.checkpoint), rtol=0, atol=0)


# Nothing waits


def steps_of(cfg: Config, device: str, count: int, profiler: Any = None) -> RunState:
    """A run after `count` steps and, within `profiler`, three more."""
    world = World(device=torch.device(device))
    prepare_torch(cfg, world.device)
    task: Any = load_task_class(cfg.TASK)(cfg)
    datasets = build_datasets(task, cfg.SEED)
    run = build_run(cfg, task, datasets["train"], plan_of(cfg, len(datasets["train"]), world), world)
    feed = Feed(task, datasets, run.plan, world, cfg.LOADER, cfg.SEED, lambda epoch: False)
    feed.start(run.progress)
    steps = feed.epoch_steps(run.progress)

    def train_on(some: Any) -> None:
        for step in some:
            loop.train_step(run, task, feed, step, lambda: (False, False), lambda parts: None)

    try:
        train_on(itertools.islice(steps, count))
        if profiler is not None:
            with profiler:
                train_on(itertools.islice(steps, 3))
    finally:
        feed.close()
    return run


@DEVICES
@pytest.mark.parametrize(
    "optim",
    [
        {},
        {"CHANNELS_LAST": True},
        {"USE_AMP": True, "AMP_DTYPE": "bf16"},
        {"OPTIMIZER": "adamw", "ACCUMULATE": 2},
        {"NONFINITE": "rollback", "SPIKE": {"WINDOW": 2}},
        pytest.param({"COMPILE": True}, marks=needs_gpu),
        pytest.param({"COMPILE": True, "CUDA_GRAPHS": True}, marks=needs_gpu),
    ],
)
def test_the_profiler_sees_no_wait_for_the_gpu_in_a_step(optim: dict[str, Any], device: str, tmp_path: Path) -> None:
    with torch_put_back():
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        count = 1 if "ACCUMULATE" in optim else 4
        profiler = torch.profiler.profile(activities=activities)
        steps_of(cfg_of(tmp_path, device, optim=optim), device, count, profiler)
    seen = {event.key for event in profiler.key_averages()}
    assert "aten::conv2d" in seen or "COMPILE" in optim
    assert not seen & {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"}
