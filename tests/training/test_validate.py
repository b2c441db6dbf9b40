"""A pass over the validation split: without gradients, unless the task says that it needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Pair
from runs import assert_same_bits
from small_runs import config, notes, run_until, saved_state, train
from tasks_that_surprise import ScoreSorts

import raytrain
from raytrain.data.feed import Feed
from raytrain.engine.state import build_run
from raytrain.engine.world import World
from raytrain.errors import TaskError
from raytrain.task import make_task
from raytrain.training.validate import evaluate, infer_time
from raytrain.training.worker import build_datasets, plan_of


@pytest.mark.parametrize("task", ["Forces", "PredictedForces"])
def test_a_task_whose_evaluation_needs_gradients_is_evaluated_in_training_and_by_eval(
    task: str, tmp_path: Path
) -> None:
    cfg = config(tmp_path, task, {})
    result = train(cfg)
    assert result.status == "finished" and raytrain.evaluate(cfg).metrics == result.metrics


@pytest.mark.parametrize(
    ("batch_s", "said"),
    [
        ([0.5], "500 ms a batch of 4: the mean of 1, 0 before it"),
        ([0.5, 0.01], "10 ms a batch of 4: the mean of 1, 1 before it"),
        ([0.5, 0.01, 0.03, 7.0], "20 ms a batch of 4: the mean of 2, 1 before it"),
        ([9.0] * 2 + [0.25] * 18, "250 ms a batch of 4: the mean of 17, 2 before it"),
    ],
)
def test_batches_that_warm_up_and_a_last_one_that_is_short_do_not_count(batch_s: list[float], said: str) -> None:
    assert infer_time(batch_s, 4) == said


@pytest.mark.parametrize("task", ["ForcesUnsaid", "PredictedForcesUnsaid"])
def test_one_that_does_not_say_so_is_told_what_to_write_and_its_epoch_is_saved(task: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=rf"(?s)Write `eval_needs_grad = True` in class {task}.*in forces"):
        train(config(tmp_path, task, {}))
    assert list(tmp_path.rglob("ckpt/checkpoint_epoch_1/manifest.json"))


def surprising(folder: Path, task: str, **sections: Any) -> Any:
    return config(folder, task, {}, **sections).model_copy(update={"TASK": f"tasks_that_surprise:{task}"})


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("AverageForGood", "0.weight, 0.bias, 1.weight, 1.bias, 4.weight and 1 more"),
        ("AverageByData", "0.weight, 0.bias, 1.weight, 1.bias, 4.weight and 1 more"),
        ("DropoutInPredict", "1.running_mean, 1.running_var, 1.num_batches_tracked"),
        ("AverageUntilScore", None),
        ("Scored", None),
    ],
)
def test_evaluation_leaves_the_model_as_it_was(task: str, names: str | None, tmp_path: Path) -> None:
    """With it, without it, and with a resume after it: the same weights."""
    without = train(surprising(tmp_path / "without", task, EVAL={"EVERY": None}))
    result = train(surprising(tmp_path / "with", task))
    said = [note for note in notes(result.run_dir) if note.startswith("evaluation changed")]
    assert len(said) == (names is not None)
    assert names is None or said[0].startswith(f"evaluation changed {names} of the model, which was then put back")
    run_until(surprising(tmp_path / "resumed", task), stop_at=12)
    resumed = train(surprising(tmp_path / "resumed", task))
    assert resumed.metrics == result.metrics
    for other in (without, resumed):
        assert_same_bits(saved_state(other.checkpoint), saved_state(result.checkpoint))


def test_predictions_that_score_has_sorted_are_drawn_in_the_data_sets_order(tmp_path: Path) -> None:
    train(surprising(tmp_path, "ScoreSorts"))
    assert len(ScoreSorts.drawn) == 23 and ScoreSorts.drawn != sorted(ScoreSorts.drawn)


def of_two(rank: int, task_name: str, folder: str) -> tuple[dict[str, float], list[str], bool]:
    """Metrics, what the task notes, and whether the model is what it was, of one evaluation by two ranks."""
    cfg = surprising(Path(folder), task_name)
    world = World(rank, 2, 2)
    task = make_task(cfg)
    datasets = build_datasets(task, cfg.SEED)
    run = build_run(cfg, task, datasets["train"], plan_of(cfg, 48, world), world)
    feed = Feed(task, datasets, run.plan, world, cfg.LOADER, cfg.SEED, lambda epoch: True)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    for param in run.model.parameters():
        param.data.mul_(2)  # other than their average, which is a buffer
    before |= {name: param.detach().clone() for name, param in run.model.named_parameters()}
    feed.start(run.progress, evaluate_first=True, trains=False)
    metrics = evaluate(run, task, feed).metrics
    state = run.model.state_dict()
    return metrics, task.take_notes(), all(torch.equal(state[name], value) for name, value in before.items())


def test_what_predict_collects_on_each_rank_is_named_and_what_only_score_puts_back_is_put_back(
    pair: Pair, tmp_path: Path
) -> None:
    (metrics, [note], _), _ = pair.run(of_two, "CollectsInPredict", str(tmp_path))
    assert metrics["predictions"] == 23 and metrics["seen"] == 12, "rank 0's part"
    assert note.startswith("CollectsInPredict.right changed while CollectsInPredict.predict ran: each of the 2 workers")
    assert [(notes, same) for _, notes, same in pair.run(of_two, "Scored", str(tmp_path))] == [([], True), ([], True)]
    for _, _, same in pair.run(of_two, "AverageUntilScore", str(tmp_path)):
        assert same
