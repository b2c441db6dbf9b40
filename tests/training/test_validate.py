"""A pass over the validation split: without gradients, unless the task says that it needs them."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import config, train

import raytrain
from raytrain.errors import TaskError


@pytest.mark.parametrize("task", ["Forces", "PredictedForces"])
def test_a_task_whose_evaluation_needs_gradients_is_evaluated_in_training_and_by_eval(
    task: str, tmp_path: Path
) -> None:
    cfg = config(tmp_path, task, {})
    result = train(cfg)
    assert result.status == "finished" and raytrain.evaluate(cfg).metrics == result.metrics


@pytest.mark.parametrize("task", ["ForcesUnsaid", "PredictedForcesUnsaid"])
def test_one_that_does_not_say_so_is_told_what_to_write_and_its_epoch_is_saved(task: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=rf"(?s)Write `eval_needs_grad = True` in class {task}.*in forces"):
        train(config(tmp_path, task, {}))
    assert list(tmp_path.rglob("ckpt/checkpoint_epoch_1/manifest.json"))
