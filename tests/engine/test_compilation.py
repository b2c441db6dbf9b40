"""COMPILE trains to the same weights; where the compiler fails the run goes on eagerly, and says why."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compiler import compiler_files_are_ours
from processes import Pair
from small_runs import config, journal, notes, run_until, saved_state, train
from tasks_for_units import Points, PointsTask
from torch import nn

from raytrain.config.sections import Config
from raytrain.engine.compilation import Compilation, open_compilation
from raytrain.engine.world import World
from raytrain.errors import TaskError
from raytrain.launch import Result

__all__ = ["compiler_files_are_ours"]  # a fixture for every test here

# What torch imports to compile warns of itself.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


class InPlaceTask(PointsTask):
    """BatchNorm, no dropout (compiled, it draws other numbers), and a forward pass that changes its batch."""

    def build_dataset(self, split: str) -> Any:
        return Points(48 if split == "train" else 20, noisy=split == "train")

    def build_model(self, dataset: Any) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def model_func(self, model: nn.Module, batch: Any) -> Any:
        batch[0].add_(0.5)
        return super().model_func(model, batch)


class DropoutTask(PointsTask):
    """Named here, so that all tests of this file find their tasks in it."""


def cfg_of(folder: Path, task: str, optim: dict[str, Any] | None = None, **sections: Any) -> Config:
    """48 samples in batches of five: the last one of an epoch is short."""
    cfg = config(folder, "PointsTask", {"BATCH_SIZE_PER_GPU": 5, "LR": 0.01, **(optim or {})}, **sections)
    return cfg.model_copy(update={"TASK": f"{__name__}:{task}"})


def losses(result: Result) -> list[float]:
    return [step["loss"] for step in journal(result.run_dir, "step")]


def test_compiled_training_ends_with_the_eager_weights_and_a_resumed_one_with_the_same_bits(tmp_path: Path) -> None:
    optim = {"ACCUMULATE": 2, "OPTIMIZER": "sgd"}
    eager = train(cfg_of(tmp_path / "eager", "InPlaceTask", optim))
    compiled = train(cfg_of(tmp_path / "compiled", "InPlaceTask", {**optim, "COMPILE": True}))
    assert notes(compiled.run_dir) == []
    torch.testing.assert_close(saved_state(compiled.checkpoint), saved_state(eager.checkpoint), rtol=1e-5, atol=1e-6)
    parts = cfg_of(tmp_path / "parts", "InPlaceTask", {**optim, "COMPILE": True})
    run_until(parts, stop_at=4)  # of five in an epoch: the short batch comes first
    resumed = train(parts)
    torch.testing.assert_close(saved_state(resumed.checkpoint), saved_state(compiled.checkpoint), rtol=0, atol=0)
    assert losses(resumed) == losses(compiled)


def test_without_a_working_compiler_a_run_is_the_eager_one_to_the_bit_and_says_why(tmp_path: Path) -> None:
    from torch._inductor import config as inductor_config

    eager = train(cfg_of(tmp_path / "eager", "DropoutTask"))
    with inductor_config.patch("cpp.cxx", (None, "/nowhere/g++")):  # as CXX does in a process that has yet to start
        compiled = train(cfg_of(tmp_path / "compiled", "DropoutTask", {"COMPILE": True}))
    assert losses(compiled) == losses(eager)
    torch.testing.assert_close(saved_state(compiled.checkpoint), saved_state(eager.checkpoint), rtol=0, atol=0)
    (told,) = notes(compiled.run_dir)
    assert told.startswith("COMPILE is given up, the model runs eagerly: ") and "/nowhere/g++" in told


def batch_of(size: int) -> dict[str, torch.Tensor]:
    return {"x": torch.ones(size, 3)}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def test_a_rehearsal_leaves_no_trace_in_model_or_batch() -> None:
    model = net()
    compilation, before = Compilation(model, World(), cuda_graphs=False), copy.deepcopy(model.state_dict())
    batch, counter = batch_of(4), model[1].num_batches_tracked

    def rehearse(copied: dict[str, torch.Tensor]) -> None:
        model[1].running_mean.add_(1)
        model[1].num_batches_tracked = torch.tensor(7)
        copied.pop("x").zero_()

    compilation.try_out(batch, rehearse)
    assert batch["x"].sum() == 12
    assert model[1].num_batches_tracked is counter
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert compilation.why_eager is None and "forward" in vars(model)


def test_each_shape_is_rehearsed_once_for_training_and_once_for_evaluation() -> None:
    model, seen = net(), []
    compilation = Compilation(model, World(), cuda_graphs=False)
    for training in (True, False, True):
        model.train(training)
        for size in (4, 4, 3, 4):
            compilation.try_out(batch_of(size), lambda batch: seen.append((model.training, len(batch["x"]))))
    assert seen == [(True, 4), (True, 3), (False, 4), (False, 3)]


def fail(batch: Any) -> None:
    raise NotImplementedError("no kernel\nfor this")


def test_after_a_failure_the_model_is_eager_for_good_and_it_is_said_once() -> None:
    model, again = net(), []
    compilation = Compilation(model, World(), cuda_graphs=False)
    compilation.try_out(batch_of(4), fail)
    compilation.try_out(batch_of(3), again.append)
    assert again == [] and "forward" not in vars(model)
    assert compilation.notes == ["COMPILE is given up, the model runs eagerly: NotImplementedError: no kernel for this"]


def test_what_a_task_does_wrong_is_not_blamed_on_the_compiler() -> None:
    compilation = Compilation(net(), World(), cuda_graphs=False)

    def wrong(batch: Any) -> None:
        raise TaskError("model_func gave None")

    with pytest.raises(TaskError):
        compilation.try_out(batch_of(4), wrong)
    assert compilation.notes == []


def tried_on(rank: int, failing_rank: int) -> tuple[str | None, bool]:
    model = net()
    compilation = Compilation(model, World(rank, 2, 2), cuda_graphs=False)
    model.eval()
    if rank == 0:  # evaluates first, and alone
        compilation.try_out(batch_of(2), lambda batch: None)
    model.train()
    compilation.try_out(batch_of(4), fail if rank == failing_rank else lambda batch: None)
    return compilation.why_eager, "forward" in vars(model)


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_where_one_process_cannot_compile_all_run_eagerly(failing_rank: int, pair: Pair) -> None:
    assert pair.run(tried_on, failing_rank) == [("NotImplementedError: no kernel for this", False)] * 2


def test_what_cannot_be_compiled_or_captured_is_said_before_the_first_step() -> None:
    def opened(**changes: Any) -> tuple[bool, list[str]]:
        optim_cfg = SimpleNamespace(**{"SYNC_BN": False, "CUDA_GRAPHS": False, **changes})
        compilation, told = open_compilation(net(), optim_cfg, World(0, 2, 2), 1)
        return compilation is not None, told

    assert opened() == (True, [])
    assert opened(CUDA_GRAPHS=True) == (
        True,
        ["CUDA_GRAPHS is given up, the model is compiled without: the device is cpu"],
    )
    compiles, (told,) = opened(SYNC_BN=True)
    assert not compiles and told.endswith("SYNC_BN talks to the other workers in its midst")


def test_cuda_graphs_need_compile() -> None:
    optim = {"BATCH_SIZE_PER_GPU": 4, "NUM_EPOCHS": 1, "CUDA_GRAPHS": True}
    with pytest.raises(ValueError, match="set COMPILE to true"):
        Config.model_validate({"TASK": "a:B", "OPTIMIZATION": optim})
