"""Means are means: over samples or over what the task counts, however a step is cut, and whoever takes its parts."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import Pair
from small_runs import Kept, config, journal, run_until, saved_state, train

import raytrain
from raytrain.config.sections import Config
from raytrain.data.feed import Feed
from raytrain.engine.state import build_run
from raytrain.engine.world import World
from raytrain.errors import TaskError
from raytrain.journal.journal import Journal
from raytrain.journal.run_folder import RunFolder
from raytrain.keeper.checkpointer import Checkpointer
from raytrain.keeper.heartbeat import Heartbeat
from raytrain.storage.store import Store
from raytrain.task import load_task_class
from raytrain.training import contract, loop
from raytrain.training.control import Control
from raytrain.training.recorder import Recorder
from raytrain.training.worker import build_datasets, evaluation_epochs, plan_of

PLAIN_SGD = {"OPTIMIZER": "sgd", "MOMENTUM": 0.0, "LR": 0.5, "GRAD_NORM_CLIP": None, "NUM_EPOCHS": 1}
# How 33 samples become one step: samples of a micro-batch, micro-batches, virtual workers.
CUTS = [(33, 1, 1), (17, 2, 1), (16, 3, 1), (10, 4, 1), (11, 1, 3), (5, 3, 3)]


def cfg_of(folder: Path, task: str, optim: dict[str, Any], weight: str = "tensor", **sections: Any) -> Config:
    tree = config(folder, "PointsTask", {**PLAIN_SGD, **optim}, MODEL={"WEIGHT": weight}, **sections).to_tree()
    return Config.model_validate({**tree, "TASK": f"tasks_for_means:{task}"})


@pytest.mark.parametrize(("task", "weight"), [("Uneven", "none"), ("Tokens", "tensor"), ("Tokens", "number")])
def test_a_step_is_that_of_one_batch_however_it_is_cut(task: str, weight: str, tmp_path: Path) -> None:
    found = []
    for cut in CUTS:
        size, accumulate, workers = cut
        optim = {"BATCH_SIZE_PER_GPU": size, "ACCUMULATE": accumulate}
        scale = {"NUM_WORKERS": 0, "USE_GPU": False, "VIRTUAL_WORKERS": workers}
        result = train(cfg_of(tmp_path / str(cut), task, optim, weight, SCALE=scale))
        [step] = journal(result.run_dir, "step")
        found.append((saved_state(result.checkpoint), step["loss"], step["grad_norm"], step["terms"], step["disp"]))
        assert sum(step["terms"].values()) == pytest.approx(step["loss"], rel=1e-5)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


def trained(rank: int, size: int, folder: str, optim: dict[str, Any], every: int) -> tuple[Any, Any, Any]:
    """Weights, step records (on rank 0) and metrics of a run over two virtual workers on `size` processes."""
    cfg = cfg_of(Path(folder), "Tokens", optim, LOG={"EVERY": every, "LINE_EVERY": 1000})
    world = World(rank, size, 2)
    task = load_task_class(cfg.TASK)(cfg)
    datasets = build_datasets(task, cfg.SEED)
    run = build_run(cfg, task, datasets["train"], plan_of(cfg, len(datasets["train"]), world), world)
    feed = Feed(task, datasets, run.plan, world, cfg.LOADER, cfg.SEED, evaluation_epochs(cfg, datasets))
    kept = Kept()
    with contextlib.closing(Journal([kept] if rank == 0 else [], cfg.LOG)) as journal_:
        saves = Checkpointer(Store(RunFolder(folder).storage, cfg.CHECKPOINT, "launch"), None)
        feed.start(run.progress)
        assert loop.train_model(run, task, feed, Recorder(run, feed, saves, journal_, Control(), Heartbeat()))
    steps = [record for record in kept.records if record["kind"] == "step"]
    told = [(s["step"], s["loss"], s["grad_norm"], s["terms"], s["disp"]) for s in steps]
    return run.model.state_dict(), told, run.metrics


@pytest.mark.parametrize("optim", [{}, {"ACCUMULATE": 2, "BATCH_SIZE_PER_GPU": 3}, {"ENGINE": "ddp"}], ids=str)
@pytest.mark.parametrize("every", [1, 3])
def test_terms_add_up_to_the_loss_and_are_the_same_for_two_processes(
    pair: Pair, optim: dict[str, Any], every: int, tmp_path: Path
) -> None:
    optim = {"NUM_EPOCHS": 2, "LR": 0.1, **optim}
    weights, steps, metrics = trained(0, 1, str(tmp_path / "alone"), optim, every)
    (first, told, found), (second, _, _) = pair.run(trained, 2, str(tmp_path / "pair"), optim, every)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close((first, told, found), (weights, steps, metrics), rtol=1e-5, atol=1e-6)
    for _, loss, _, terms, _ in told:
        assert sum(terms.values()) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_with_weights_that_is_stopped_and_goes_on_ends_with_the_same_bits(workers: int, tmp_path: Path) -> None:
    optim = {"NUM_EPOCHS": 2, "OPTIMIZER": "adamw", "ACCUMULATE": 2, "BATCH_SIZE_PER_GPU": 3}
    cfg = cfg_of(tmp_path / "stopped", "Tokens", optim, LOADER={"WORKERS": workers})
    stopped, _ = run_until(cfg, stop_at=8)
    assert stopped.status == "stopped" and stopped.progress.cursor > 0
    states = [saved_state(train(each).checkpoint) for each in (cfg, cfg_of(tmp_path / "whole", "Tokens", optim))]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_evaluation_by_the_loss_is_the_mean_over_what_counts(tmp_path: Path) -> None:
    losses = []
    for size in (11, 4, 1):  # the last leaves sample 3 alone, of which the loss is NaN
        cfg = cfg_of(tmp_path / str(size), "Tokens", {"BATCH_SIZE_PER_GPU": size, "LR": 1e-9})
        result = train(cfg)
        assert raytrain.evaluate(cfg).metrics == result.metrics
        losses.append(result.metrics["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_weight_for_some_batches_only_is_refused_in_training_and_in_evaluation(split: str, tmp_path: Path) -> None:
    cfg = cfg_of(tmp_path, "Tokens", {"BATCH_SIZE_PER_GPU": 4}, f"in half of {split}")
    with pytest.raises(TaskError, match="gave ModelReturn a weight for some micro-batches and none for others"):
        train(cfg)
    assert bool(list(tmp_path.rglob("checkpoint_epoch_1"))) == (split == "val")


def test_a_step_in_which_nothing_counts_is_told_as_such(tmp_path: Path) -> None:
    cfg = cfg_of(tmp_path, "Tokens", {"BATCH_SIZE_PER_GPU": 1}, LOADER={"WORKERS": 0, "SHUFFLE": False})
    result = train(cfg)
    [event] = [e for e in journal(result.run_dir, "event") if e["event"] == "nonfinite"]
    told = "step 4: the weights of its micro-batches (ModelReturn) add up to nothing: 0, or one is negative (samples 3)"
    assert event["message"].startswith(f"{told}: it changed nothing") and event["step"] == 4


@pytest.mark.parametrize(
    "weight",
    ["3", -1, math.nan, math.inf, [2], {"n": 2}, 2j, torch.tensor([1.0, 2.0]), torch.tensor(-2), torch.tensor(2j)],
    ids=str,
)
def test_a_weight_that_counts_nothing_is_refused_with_what_to_give(weight: Any) -> None:
    loss = torch.ones(1, requires_grad=True)
    with pytest.raises(TaskError, match=r"PointsTask.model_func gave .* as weight; give how many samples, tokens"):
        contract.part_of(raytrain.ModelReturn(loss, weight=weight), 1.0, points_task())


@pytest.mark.parametrize("weight", [3, 3.0, True, torch.tensor(3), torch.tensor([[3.0]]), np.int64(3), np.float32(3)])
def test_a_weight_is_a_number_or_a_tensor_of_one(weight: Any) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        loss = torch.ones((), dtype=dtype, requires_grad=True)
        share = contract.part_of(raytrain.ModelReturn(loss, weight=weight), 1.0, points_task()).share
        assert isinstance(share, torch.Tensor) and share.item() == float(weight) and share.shape == ()
        assert share.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


def points_task() -> raytrain.Task:
    return load_task_class("tasks_for_units:PointsTask")(None)  # type: ignore[arg-type]
