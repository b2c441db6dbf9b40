"""The loop end to end in this process: OpenPCDet's own run, evaluation, best metric, when to save and to stop."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import Pair
from small_runs import INDEX, Watched, config, journal, run_until, saved_state, train
from tasks_for_units import TOY

import raytrain
from raytrain.data.feed import Feed
from raytrain.engine.state import build_run
from raytrain.engine.world import World
from raytrain.errors import TaskError, TrainingError
from raytrain.journal.records import read_journal
from raytrain.storage.state_file import load_weights_file
from raytrain.task import load_task_class
from raytrain.training import contract, loop, validate
from raytrain.training.worker import build_datasets, plan_of

# The heritage's numbers


@pytest.mark.parametrize("name", ["adam_onecycle_clip10_f64", "sgd_clip10_f64"])
def test_a_whole_run_has_the_heritages_weights_to_1e_12(name: str, tmp_path: Path) -> None:
    golden = np.load(TOY / f"{name}.npz")
    cfg = config(tmp_path, "GoldenToyTask", INDEX[name]["optim_cfg"], LOADER={"WORKERS": 0, "SHUFFLE": False})
    result = train(cfg)
    assert result.status == "finished"
    state = saved_state(result.checkpoint)
    for key, value in state.items():
        np.testing.assert_allclose(value, golden[f"final.{key}"], rtol=0, atol=1e-12, err_msg=key)
    steps = journal(result.run_dir, "step")
    assert [s["step"] for s in steps] == list(range(1, 22))
    np.testing.assert_allclose([s["lr"] for s in steps], golden["lr"][:, 0], rtol=1e-15)
    np.testing.assert_allclose([s["momentum"] for s in steps if s["momentum"] is not None] or 0.9, golden["mom"])
    np.testing.assert_allclose([s["loss"] for s in steps], golden["loss"], rtol=0, atol=1e-6)
    np.testing.assert_allclose([s["grad_norm"] for s in steps], golden["gnorm"], rtol=1e-6)
    np.testing.assert_allclose([s["terms"]["third"] for s in steps], golden["loss"] / 3, rtol=0, atol=1e-6)
    assert {s["disp"]["size"] for s in steps} == {4}


def test_a_run_without_validation_is_complete_when_it_is_launched_again(tmp_path: Path) -> None:
    optim = INDEX["sgd_clip10_f64"]["optim_cfg"]
    cfg = config(tmp_path, "GoldenToyTask", optim)
    first = train(cfg)
    again = train(cfg)
    assert (first.status, again.status) == ("finished", "complete")
    assert again.checkpoint == first.checkpoint
    assert len(journal(first.run_dir, "run")) == 1


# Evaluation


def evaluated(rank: int, size: int, task_name: str) -> tuple[dict[str, float], int]:
    world = World(rank, size, 2)
    cfg = config(Path("unused"), task_name, {})
    task = load_task_class(cfg.TASK)(cfg)
    datasets = build_datasets(task, cfg.SEED)
    run = build_run(cfg, task, datasets["train"], plan_of(cfg, len(datasets["train"]), world), world)
    feed = Feed(task, datasets, run.plan, world, cfg.LOADER, cfg.SEED, lambda epoch: False)
    feed.start(run.progress, evaluate_first=True)
    # The stream goes on with training; only its evaluation is read here.
    validation = validate.evaluate(run, task, feed)
    feed.close()
    return validation.metrics, len(validation.predictions)


@pytest.mark.parametrize("task_name", ["PredictingTask", "PointsTask"])
def test_evaluation_is_the_same_for_one_process_and_for_two(pair: Pair, task_name: str) -> None:
    alone, _ = evaluated(0, 1, task_name)
    (first, count), (second, nothing) = pair.run(evaluated, 2, task_name)
    assert alone == first == second  # to the bit, and on every rank
    assert set(alone) == ({"accuracy", "first"} if task_name == "PredictingTask" else {"loss"})
    assert count == (23 if task_name == "PredictingTask" else 6) and nothing == 0


@pytest.mark.parametrize(("every", "epochs"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (None, [5])])
def test_evaluation_comes_every_n_epochs_and_at_the_end(every: int | None, epochs: list[int], tmp_path: Path) -> None:
    cfg = config(tmp_path, "PredictingTask", {"NUM_EPOCHS": 5}, EVAL={"EVERY": every})
    result = train(cfg)
    evals = journal(result.run_dir, "eval")
    assert [e["epoch"] for e in evals] == epochs
    assert all(e["samples"] == 23 for e in evals)
    assert result.metrics == evals[-1]["metrics"]


def test_without_predict_the_loss_of_the_split_is_the_metric(tmp_path: Path) -> None:
    cfg = config(tmp_path, "PointsTask", {"NUM_EPOCHS": 1})
    result = train(cfg)
    task = load_task_class(cfg.TASK)(cfg)
    model = task.build_model(None)
    model.load_state_dict(saved_state(result.checkpoint))
    val = task.build_dataset("val")
    x, y = (torch.stack(parts) for parts in zip(*val, strict=True))
    expected = torch.nn.functional.cross_entropy(model.eval()(x), y).item()
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-6)


def test_evaluation_changes_nothing_of_the_training(tmp_path: Path) -> None:
    states = []
    for every in (1, None):
        cfg = config(tmp_path / str(every), "PointsTask", {"NUM_EPOCHS": 3}, EVAL={"EVERY": every})
        states.append(saved_state(train(cfg).checkpoint))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


# The best metric


@pytest.mark.parametrize(
    ("mode", "scores", "better"),
    [
        ("max", [0.5, 0.9, 0.7, 0.9], [True, True, False, False]),
        ("min", [0.5, 0.9, 0.3, 0.4], [True, False, True, False]),
        ("max", [float("nan"), 0.2, float("nan"), 0.1], [False, True, False, False]),
    ],
)
def test_the_best_checkpoint_is_told_and_kept(
    mode: str, scores: list[float], better: list[bool], tmp_path: Path
) -> None:
    policy = {"METRIC": "points", "MODE": mode, "KEEP_BEST": 1, "KEEP_LAST": 1}
    written = [s if s == s else "nan" for s in scores]  # a config holds finite numbers only
    cfg = config(tmp_path, "ScriptedTask", {"NUM_EPOCHS": 4}, CHECKPOINT=policy, MODEL={"SCORES": written})
    result = train(cfg)
    assert [e["best"] for e in journal(result.run_dir, "eval")] == better
    best = 4 - better[::-1].index(True)
    assert result.best_checkpoint == str(Path(result.run_dir) / "ckpt" / f"checkpoint_epoch_{best}")
    assert result.checkpoint is not None and result.checkpoint.endswith("checkpoint_epoch_4")
    kept = sorted(p.name for p in (Path(result.run_dir) / "ckpt").iterdir())
    assert kept == sorted({f"checkpoint_epoch_{best}", "checkpoint_epoch_4"})
    assert journal(result.run_dir, "end")[0]["best"] == {"points": scores[best - 1]}


def test_the_best_metric_outlives_a_stop(tmp_path: Path) -> None:
    policy = {"METRIC": "points", "KEEP_BEST": 1, "KEEP_LAST": 1}
    model = {"SCORES": [0.9, 0.1, 0.2, 0.3]}
    cfg = config(tmp_path, "ScriptedTask", {"NUM_EPOCHS": 4}, CHECKPOINT=policy, MODEL=model)
    stopped, run_dir = run_until(cfg, stop_at=10)
    assert stopped.status == "stopped" and stopped.progress.step == 10
    result = train(cfg)
    assert [e["best"] for e in journal(run_dir, "eval")] == [True, False, False, False]
    assert result.best_checkpoint is not None and result.best_checkpoint.endswith("checkpoint_epoch_1")


def test_a_metric_that_the_task_does_not_give_is_an_error_that_names_those_it_does(tmp_path: Path) -> None:
    policy = {"METRIC": "acuracy"}
    cfg = config(tmp_path, "PredictingTask", {"NUM_EPOCHS": 1}, CHECKPOINT=policy)
    with pytest.raises(TaskError, match="'acuracy', which the evaluation does not give; it gives accuracy, first"):
        train(cfg)


# When to save and to stop


def test_a_wish_to_stop_ends_the_run_after_the_step_under_way_with_its_state_saved(tmp_path: Path) -> None:
    cfg = config(tmp_path, "PointsTask", {"NUM_EPOCHS": 2})
    outcome, run_dir = run_until(cfg, stop_at=5)
    assert (outcome.status, outcome.progress.step, outcome.progress.cursor) == ("stopped", 5, 20)
    assert [c["name"] for c in journal(run_dir, "checkpoint")] == ["checkpoint_step_5"]
    assert journal(run_dir, "end")[-1]["status"] == "stopped"


@pytest.mark.ray
@pytest.mark.parametrize("stop_at", [1, 5, 12, 13, 24])
def test_a_stopped_run_ends_with_the_same_bits(stop_at: int, tmp_path: Path) -> None:
    """12 steps make an epoch: in its middle, at its end, and at the very end."""
    whole = train(config(tmp_path / "whole", "PredictingTask", {"ACCUMULATE": 1}, EVAL={"EVERY": 1}))
    cfg = config(tmp_path / "parts", "PredictingTask", {"ACCUMULATE": 1}, EVAL={"EVERY": 1})
    outcome, run_dir = run_until(cfg, stop_at=stop_at)
    assert outcome.status == "stopped" and outcome.progress.step == stop_at
    result = train(cfg)
    assert result.status == "finished"
    expected = load_weights_file(f"{whole.checkpoint}/checkpoint.pth")
    found = load_weights_file(f"{result.checkpoint}/checkpoint.pth")
    torch.testing.assert_close(found["model_state"], expected["model_state"], rtol=0, atol=0)
    for index, moments in expected["optimizer_state"]["state"].items():
        torch.testing.assert_close(found["optimizer_state"]["state"][index], moments, rtol=0, atol=0)
    assert result.metrics == whole.metrics
    assert [e["epoch"] for e in journal(run_dir, "eval")] == [1, 2]
    assert [s["step"] for s in journal(run_dir, "step")] == list(range(1, 25))
    for ours, theirs in zip(journal(run_dir, "step"), journal(whole.run_dir, "step"), strict=True):
        assert [ours[k] for k in ("loss", "lr", "grad_norm")] == [theirs[k] for k in ("loss", "lr", "grad_norm")]


def test_an_evaluation_that_a_stop_left_owing_comes_before_the_next_step(tmp_path: Path) -> None:
    cfg = config(tmp_path, "PredictingTask", {"NUM_EPOCHS": 2})
    _, run_dir = run_until(cfg, stop_at=12)
    assert journal(run_dir, "eval") == []
    run_until(cfg, stop_at=13)
    order = [(r["kind"], r["step"]) for r in read_journal(run_dir / "journal.jsonl") if r["kind"] in ("eval", "step")]
    assert order[-2:] == [("eval", 12), ("step", 13)]


@pytest.mark.ray
def test_checkpoints_come_by_steps_by_seconds_and_by_epochs(tmp_path: Path) -> None:
    def saved(every: dict[str, Any]) -> list[int]:
        policy = {"EVERY_EPOCHS": None, "EVERY_SECONDS": None, **every}
        cfg = config(tmp_path / str(every), "PointsTask", {}, CHECKPOINT=policy, EVAL={"EVERY": None})
        _, run_dir = run_until(cfg)
        return [c["step"] for c in journal(run_dir, "checkpoint")]

    assert saved({}) == [24]  # the end, always
    assert saved({"EVERY_EPOCHS": 1}) == [12, 24]
    # One that waits gives way to a newer one.
    assert {7, 24} <= set(saved({"EVERY_STEPS": 7})) <= {7, 14, 21, 24}
    # 10 s a step, and the clock starts with the first.
    assert {9, 24} <= set(saved({"EVERY_SECONDS": 75.0})) <= {9, 18, 24}


def test_the_outside_is_told_of_each_checkpoint_once_its_metrics_are_known(tmp_path: Path) -> None:
    cfg = config(
        tmp_path, "PredictingTask", {}, CHECKPOINT={"EVERY_STEPS": 8, "EVERY_SECONDS": None}, EVAL={"EVERY": 2}
    )
    control = Watched()
    run_until(cfg, control=control)
    names = [save.name for save, _ in control.told]
    assert names == ["checkpoint_step_8", "checkpoint_epoch_1", "checkpoint_step_16", "checkpoint_epoch_2"]
    assert [bool(metrics) for _, metrics in control.told] == [False, False, False, True]


def test_weights_that_are_not_finite_are_not_saved_and_the_last_good_ones_stay(tmp_path: Path) -> None:
    cfg = config(tmp_path, "PoisonedTask", {"NUM_EPOCHS": 2}, MODEL={"STEP": 16}, EVAL={"EVERY": None})
    with pytest.raises(TrainingError, match=r"no longer finite.*last good checkpoint is untouched"):
        train(cfg)
    run_dir = tmp_path / cfg.TAG / cfg.EXTRA_TAG
    names = sorted(p.name for p in (run_dir / "ckpt").iterdir())  # the last one was in memory
    assert names[0] == "checkpoint_epoch_1" and len(names) <= 2
    for name in names:
        assert all(v.isfinite().all() for v in saved_state(str(run_dir / "ckpt" / name)).values())


# What a task gives


def test_what_a_task_gives_instead_of_a_loss_is_named() -> None:
    task = load_task_class("tasks_for_units:PointsTask")(None)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match=r"PointsTask.model_func gave dict with loss NoneType"):
        contract.loss_of({"loss": torch.ones(())}, task)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match=r"loss float"):
        contract.loss_of(raytrain.ModelReturn(1.0), task)  # type: ignore[arg-type]
    several = torch.tensor([1.0, 3.0], requires_grad=True)
    assert contract.loss_of(raytrain.ModelReturn(several), task).item() == 2.0


@pytest.mark.parametrize(
    "metrics", [0.9, {"accuracy": "high"}, {"accuracy": torch.ones(2)}, {"accuracy": None}, {"accuracy": 10**400}]
)
def test_a_score_that_is_no_dict_of_numbers_is_refused(metrics: Any) -> None:
    task = load_task_class("tasks_for_units:PointsTask")(None)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match=r"PointsTask.score gave"):
        contract.checked_metrics(metrics, task)
    assert contract.checked_metrics({"a": np.float32(0.5), "b": torch.tensor(2)}, task) == {"a": 0.5, "b": 2.0}


# A step waits for nothing


def test_a_step_reads_nothing_from_the_device_and_writes_nothing() -> None:
    """Each of these would wait for the device."""
    waits = {"item", "tolist", "cpu", "numpy", "synchronize", "nonzero"}
    tree = ast.parse(Path(loop.__file__).read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for name in ("train_step", "train_one_epoch"):
        for node in ast.walk(functions[name]):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"float", "int", "bool", "print", "open"}, f"{name}: {ast.unparse(node)}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in waits, f"{name}: {ast.unparse(node)}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: sync debug mode exists only there")
def test_a_step_on_a_gpu_never_waits_for_it(tmp_path: Path) -> None:
    cfg = config(tmp_path, "PointsTask", {}, SCALE={"NUM_WORKERS": 0, "USE_GPU": True})
    world = World(device=torch.device("cuda"))
    task = load_task_class(cfg.TASK)(cfg)
    datasets = build_datasets(task, cfg.SEED)
    run = build_run(cfg, task, datasets["train"], plan_of(cfg, len(datasets["train"]), world), world)
    feed = Feed(task, datasets, run.plan, world, cfg.LOADER, cfg.SEED, lambda epoch: False)
    feed.start(run.progress)
    steps = list(feed.epoch_steps(run.progress))
    loop.train_step(run, task, feed, steps[0], lambda: (False, False), lambda parts: None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps[1:4]:
            loop.train_step(run, task, feed, step, lambda: (False, False), lambda parts: None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        feed.close()
