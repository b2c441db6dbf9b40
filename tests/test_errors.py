"""What is told of a failure: the user's own frames, the place, and what the command line returns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TrainingError,
    failure_of,
    failure_screen,
    keep_traceback,
    listed,
    users_traceback,
)
from raytrain.task import Task, load_task_class
from raytrain.training import contract


def raised_by(call: Callable[..., Any], *args: Any) -> BaseException:
    """What the call raises in a thread: as in a worker, no frame of ours or the user's stands around it."""
    with ThreadPoolExecutor() as pool:
        error = pool.submit(call, *args).exception()
    assert error is not None
    return error


def users_forward() -> None:
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


class UsersModel(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        users_forward()
        return x


class UsersTask(Task):
    def predict(self, model: Any, batch: Any) -> Any:
        return model(batch)


def failed_prediction() -> BaseException:
    """raytrain's loop around the user's task around torch's call of the user's model."""
    return raised_by(contract.predictions_of, UsersTask(None), UsersModel(), torch.ones(1), 1)  # type: ignore[arg-type]


def test_a_traceback_begins_at_the_users_first_line() -> None:
    lines = users_traceback(failed_prediction()).split("\n")
    assert lines[0] == "Traceback (most recent call last):"
    assert "test_errors.py" in lines[1] and lines[1].endswith("in predict")
    assert not any("raytrain/training/loop.py" in line or "concurrent" in line for line in lines)
    text = "\n".join(lines)
    assert text.index("in predict") < text.index("_call_impl") < text.index("users_forward()")
    assert lines[-1] == "RuntimeError: mat1 and mat2 shapes cannot be multiplied"


def test_a_traceback_ends_at_the_users_last_line_where_it_is_ours_that_complains() -> None:
    class Half(UsersTask):
        def build_dataset(self, split: str) -> Any:
            return Task.build_dataset(self, split)

    text = users_traceback(raised_by(Half(None).build_dataset, "train"))  # type: ignore[arg-type]
    assert "in build_dataset" in text and "raytrain/task.py" not in text


def test_where_no_frame_is_the_users_the_traceback_is_whole() -> None:
    code = (
        "from raytrain.errors import users_traceback\nfrom raytrain.task import load_task_class\n"
        "try: load_task_class('no_such_module_here:X')\nexcept Exception as error: print(users_traceback(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "TaskError: TASK 'no_such_module_here:X'" in done.stdout and "raytrain/task.py" in done.stdout


def test_the_cause_of_an_error_is_told_too() -> None:
    def both() -> None:
        try:
            users_forward()
        except RuntimeError as error:
            raise ValueError("could not go forward") from error

    text = users_traceback(raised_by(both))
    assert (
        text.index("RuntimeError: mat1") < text.index("direct cause") < text.index("ValueError: could not go forward")
    )


def test_a_folder_whose_name_begins_like_ours_is_the_users(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "raytrain"
    code = compile("def fail():\n    raise KeyError('points')", f"{folder}_lidar/model.py", "exec")
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert "raytrain_lidar/model.py" in users_traceback(raised_by(scope["fail"]))


def test_a_task_that_comes_with_raytrain_counts_as_the_users() -> None:
    digits = load_task_class("raytrain.tasks.digits:DigitsTask")
    text = users_traceback(raised_by(digits, None))
    assert "raytrain/tasks/digits.py" in text


@pytest.mark.parametrize(
    ("error", "expected", "exit_status"),
    [
        (ConfigError("TASK is missing"), True, 2),
        (CheckpointError("damaged"), True, 1),
        (TrainingError("weights are NaN"), True, 1),
        (DataError("sample 3: ValueError: x"), False, 1),
        (ValueError("x"), False, 1),
        (KeyboardInterrupt(), False, 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_that_explain_themselves_are_told_from_the_others(
    error: BaseException, expected: bool, exit_status: int
) -> None:
    failure = failure_of(raised_by(fail, error), 1, {"epoch": 0, "step": 7}, "logs/rank_1.log")
    assert (failure["expected"], failure["exit_status"]) == (expected, exit_status)
    assert (failure["rank"], failure["epoch"], failure["step"], failure["logs"]) == (1, 0, 7, "logs/rank_1.log")
    assert failure["message"] == str(error)
    assert json.loads(json.dumps(failure)) == failure  # it travels through the cluster as JSON


def fail(error: BaseException) -> None:
    raise error


def test_an_error_of_a_sample_carries_the_traceback_of_the_process_that_loaded() -> None:
    told = "sample 3 of data set 'train': ValueError: x\n\nTraceback: the loader's"
    failure = failure_of(raised_by(fail, DataError(told)), 0, {"epoch": 1, "step": 2, "sample_ids": [3]}, "")
    assert failure["traceback"] == told
    screen = failure_screen(failure)
    assert "the loader's" in screen and "step 2" in screen and "epoch" in screen


def test_a_failure_fits_a_screen_with_rank_step_and_the_users_line() -> None:
    error = failed_prediction()
    screen = failure_screen(failure_of(error, 1, {"epoch": 0, "step": 7, "sample_ids": [1, 2]}, "out/logs/rank_1.log"))
    assert len(screen.split("\n")) <= 40
    for part in ("rank 1", "step 7", "users_forward()", "mat1 and mat2", "out/logs/rank_1.log"):
        assert part in screen


def test_the_whole_traceback_is_kept_in_a_file(tmp_path: Path) -> None:
    error = failed_prediction()
    kept = keep_traceback(error, str(tmp_path))
    assert "raytrain/training/contract.py" in Path(kept).read_text() and "users_forward()" in Path(kept).read_text()
    assert keep_traceback(error, "s3://bucket/run") == ""
    (tmp_path / "file").write_text("")
    assert keep_traceback(error, str(tmp_path / "file")) == ""


def test_names_are_listed_up_to_some_and_the_rest_is_counted() -> None:
    assert listed([]) == "" and listed(["a"]) == "a" and listed(iter([1, 2]), 2) == "1, 2"
    assert listed("abcdefg") == "a, b, c, d, e and 2 more"
    assert listed("abc", 2, "; ") == "a; b; and 1 more"
