"""What samples are made of may stand in a module, which loader workers have imported by themselves."""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path
from typing import Any

import helper_of_globals
import pytest
import tasks_with_globals
from small_runs import config, notes, train

import raytrain
from raytrain.data.module_values import ModuleValues, differing_note, read_values, seen
from raytrain.errors import TrainingError
from raytrain.task import make_task

OURS = "tasks_with_globals"
SET_LATE = {
    "Rebinds": f"{OURS}.LOOKUP (dict of 3, in loader workers None) differs",
    "UpdatesADict": f"{OURS}.SETTINGS differs",
    "SetsAClassAttribute": f"{OURS}.ReadsItsClass.scale (2.0, in loader workers 1.0) differs",
    "FillsAHelper": "helper_of_globals.SCALES (dict of 1, in loader workers None) differs",
    "SetsWhatIsImportedLate": "helper_of_globals.OFFSET (2.0, in loader workers 1.0) differs",
    "FillsATable": f"{OURS}.TABLE differs",
    "FillsATensor": f"{OURS}.WEIGHTS differs",
    "ParsesOptions": f"{OURS}.OPTIONS differs",
    "CollatesByModule": f"{OURS}.BIAS (1.0, in loader workers 0.0) differs",
    "PatchesAFunction": f"helper_of_globals.doubled ({OURS}.tripled, in loader workers helper_of_globals.doubled) dif",
    "MovesARoot": f"{OURS}.ROOT (PosixPath('elsewhere'), in loader workers PosixPath('here')) differs",
    "FillsAListAndASet": f"{OURS}.NAMES (list of 2, in loader workers list of 0), {OURS}.KINDS (set of 1, in loader wo",
    "SetsForValidation": f"{OURS}.Validates.kind_factor differs",
}
AS_IT_MAY_BE = ("Constants", "SetsAtImport", "HoldsTheTable")


@pytest.fixture(autouse=True)
def modules_put_back() -> Any:
    """Each run finds the modules as an import gives them."""
    kept = [(each, copy.copy(vars(each))) for each in (tasks_with_globals, helper_of_globals)]
    held = {k: copy.deepcopy(v) for k, v in vars(tasks_with_globals).items() if k in ("SETTINGS", "TABLE", "WEIGHTS")}
    yield
    for module, values in kept:
        vars(module).update(values)
    tasks_with_globals.SETTINGS.update(held["SETTINGS"])
    tasks_with_globals.TABLE[:] = held["TABLE"]
    tasks_with_globals.WEIGHTS.copy_(held["WEIGHTS"])
    tasks_with_globals.OPTIONS.gain = 1.0
    tasks_with_globals.NAMES.clear()
    tasks_with_globals.KINDS.clear()
    tasks_with_globals.CACHE.clear()
    tasks_with_globals.ReadsItsClass.scale = 1.0
    tasks_with_globals.Validates.kind_factor["val"] = 1.0


def cfg_of(folder: Path, task: str, workers: int = 1) -> Any:
    return config(folder, "", {}, TASK=f"{OURS}:{task}", LOADER={"WORKERS": workers})


@pytest.mark.ray
@pytest.mark.parametrize("task", SET_LATE)
def test_a_value_that_only_the_training_process_has_is_named_once(task: str, tmp_path: Path) -> None:
    told = notes(train(cfg_of(tmp_path, task)).run_dir)
    [note] = [note for note in told if "loader workers" in note]
    assert note.startswith(SET_LATE[task]), told
    assert "Set it where its module is imported, or hold it in the data set" in note


@pytest.mark.ray
@pytest.mark.parametrize("task", AS_IT_MAY_BE)
def test_constants_locks_and_caches_that_fill_are_no_difference(task: str, tmp_path: Path) -> None:
    assert [note for note in notes(train(cfg_of(tmp_path, task)).run_dir) if "loader workers" in note] == []


@pytest.mark.ray
def test_two_loader_workers_name_it_once(tmp_path: Path) -> None:
    told = notes(train(cfg_of(tmp_path, "Rebinds", workers=2)).run_dir)
    assert sum("LOOKUP" in note for note in told) == 1, told


def test_without_loader_workers_there_is_no_difference(tmp_path: Path) -> None:
    assert [note for note in notes(train(cfg_of(tmp_path, "Rebinds", workers=0)).run_dir) if "LOOKUP" in note] == []


@pytest.mark.ray
def test_a_sample_that_fails_for_want_of_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as failure:
        train(cfg_of(tmp_path, "Needs"))
    assert "'NoneType' object is not subscriptable" in str(failure.value)
    assert f"{OURS}.LOOKUP (dict of 3, in loader workers None) differs" in str(failure.value)


@pytest.mark.ray
def test_an_evaluation_by_itself_names_it_too(tmp_path: Path) -> None:
    train(cfg_of(tmp_path, "Rebinds", workers=0))
    told = raytrain.evaluate(cfg_of(tmp_path, "Rebinds", workers=1)).notes
    assert sum(f"{OURS}.LOOKUP" in note for note in told) == 1, told


def named(task: str, tmp_path: Path) -> set[str]:
    made = make_task(cfg_of(tmp_path, task))
    return {".".join(name) for name in read_values(made, made.build_dataset("train"))}


def test_what_making_samples_does_not_read_is_not_looked_at(tmp_path: Path) -> None:
    found = named("Constants", tmp_path)
    assert not {f"{OURS}.READS", f"{OURS}.HANDLE", f"{OURS}.LOGGER"} & found  # it sets them itself
    assert {f"{OURS}.CACHE", f"{OURS}.LOCK", f"{OURS}.CONSTANTS", "helper_of_globals._READY"} <= found
    assert not {f"{OURS}.STEPS", f"{OURS}.STARTED", f"{OURS}.LOOKUP", f"{OURS}.Constant.made"} & found


def test_nothing_of_libraries_is_looked_at(tmp_path: Path) -> None:
    homes = {name.partition(".")[0] for task in SET_LATE for name in named(task, tmp_path)}
    assert homes <= {OURS, "helper_of_globals", "tasks_with_habits"}


def test_a_value_that_changes_as_the_first_batch_is_made_is_each_processs_own() -> None:
    class OfOneName(ModuleValues):
        def __init__(self, value: Any) -> None:
            self._meant, self._before = {"train": {(OURS, "LOOKUP"): seen(value)}}, {}

    for meant, before, now, found in [(1, 1, 1, 0), (2, 1, 1, 1), (2, 1, 2, 0), (2, 1, 3, 0)]:
        values = OfOneName(meant)
        tasks_with_globals.LOOKUP = before
        values.first_batch_begins()
        tasks_with_globals.LOOKUP = now
        assert len(values.differing("train")) == found, (meant, before, now)
        assert values.differing("train") == []


def test_several_are_listed_and_the_rest_counted() -> None:
    assert differing_note([f"a.{i}" for i in range(7)]).startswith("a.0, a.1, a.2, a.3, a.4 and 2 more differ between")


@pytest.mark.parametrize(
    "value", [{"a", "b"}, float("nan"), [object()], {"f": print, 3: {4}}, sys, tasks_with_globals.opened, [[1] * 9] * 9]
)
def test_a_value_is_the_same_in_a_copy(value: Any) -> None:
    again = value if callable(value) or value is sys else copy.deepcopy(value)
    assert seen(value) == seen(again)


def test_a_look_at_much_is_bounded() -> None:
    much = [[[float(i)] * 1000 for i in range(1000)] for _ in range(100)]
    began = time.perf_counter()
    seen(much)
    assert time.perf_counter() - began < 0.1
