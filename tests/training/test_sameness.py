"""What a task builds otherwise on another rank, or when a run goes on, is named; other lengths are refused."""

from __future__ import annotations

import collections
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import commanded, torchrun
from runs import assert_same_bits
from small_runs import config, journal, notes, saved_state, train
from torch.utils.data import ConcatDataset, Subset, TensorDataset

import raytrain
from raytrain.engine.world import World
from raytrain.errors import ResumeError, TaskError
from raytrain.training.sameness import (
    arrays_of,
    check_on_all_ranks,
    compare_with_checkpoint,
    fields_of,
    hash_of,
    names_of,
    probe_keys,
)

NAMES = ["cat", "dog", "fox", "owl"]


def animals(folder: Path) -> Any:
    """A run of this config goes on from 1 epoch to 2; files in folder/build have its task build something otherwise."""
    (folder / "build").mkdir(exist_ok=True)
    build = {"BUILD": str(folder / "build")}
    task = "tasks_that_differ:AnimalsTask"
    return config(folder / "output", "", {"NUM_EPOCHS": 2}, TASK=task, DATA_CONFIG=build)


def with_epochs(cfg: Any, epochs: int) -> Any:
    return cfg.model_copy(update={"OPTIMIZATION": cfg.OPTIMIZATION.model_copy(update={"NUM_EPOCHS": epochs})})


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run has trained an epoch of two."""
    folder = tmp_path_factory.mktemp("begun")
    train(with_epochs(animals(folder), 1))
    return folder


CHANGES = {
    "labels": "samples 0, 12, 23 of train hold other values in y",
    "file": "samples 0, 12, 23 of train hold other values in x",
    "unseeded": "samples 0, 12, 23 of train hold other values in x",
    "classes": "other names, or in another order, in train.datasets[0].classes, train.datasets[1].classes, val.classes",
    "numbers": "other names, or in another order, in AnimalsTask.numbers",
    "anchors": "other numbers in AnimalsTask.anchors",
    "longer_val": "val has 12 samples, and had 8",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_run_that_goes_on_builds_otherwise_is_named(change, begun, tmp_path):
    assert CHANGES[change] in told_after(change, begun, tmp_path)


def test_of_a_run_that_goes_on_as_it_was_nothing_is_named(begun, tmp_path):
    assert told_after(None, begun, tmp_path) == ""


def told_after(change: str | None, begun: Path, folder: Path) -> str:
    shutil.copytree(begun, folder, dirs_exist_ok=True)
    cfg = animals(folder)
    if change:
        (folder / "build" / change).touch()
    lines = [
        line for line in notes(train(cfg).run_dir) if line.startswith("not as it was when the checkpoint was made")
    ]
    assert len(lines) <= 1 and "\n" not in "".join(lines)
    return "".join(lines)


def test_a_training_split_of_another_length_is_refused(begun, tmp_path):
    with pytest.raises(ResumeError, match="num_samples: was 24, now 28"):
        told_after("longer_train", begun, tmp_path)


def test_an_evaluation_names_it_too(begun, tmp_path):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    (tmp_path / "build" / "numbers").touch()
    moved, note = raytrain.evaluate(animals(tmp_path)).notes
    assert "DATA_CONFIG.BUILD: was" in moved and CHANGES["numbers"] in note


def checked(rank: int, records: tuple[dict[str, Any], dict[str, Any]]) -> list[str] | str:
    try:
        return check_on_all_ranks(records[rank], World(rank, 2, 2))
    except TaskError as error:
        return str(error)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"num_samples": {"train": 9}}, {"num_samples": {"train": 8}}, "8 samples of train on rank 1 and 9 samples"),
        ({"num_samples": {"train": 9, "val": 2}}, {"num_samples": {"train": 9}}, "9 samples of train on rank 1 and 9"),
        ({"names": {"a.b": "1"}}, {"names": {"a.b": "2"}}, ["other names, or in another order, in a.b."]),
        ({"names": {"a.b": "1"}}, {"names": {"a.c": "2"}}, []),
        ({"arrays": {"a.b": "1"}}, {"arrays": {"a.b": "2", "a.c": "3"}}, ["other numbers in a.b."]),
        ({"samples": {"sample 0": {"x": "1"}}}, {"samples": {"sample 0": {"x": "2"}}}, ["hold other values in x."]),
        ({"samples": {"sample 0": {"": "1"}}}, {"samples": {"sample 0": {"": "2"}}}, ["sample 0 hold other values."]),
        ({"hash_seed": "0"}, {"hash_seed": "7"}, ["is 7, not 0 (start with PYTHONHASHSEED=0)"]),
        ({"hash_seed": "0"}, {"hash_seed": "random"}, ["is random, not 0 (start with PYTHONHASHSEED=0)"]),
        ({"hash_seed": "random"}, {"hash_seed": "7"}, ["is 7, not random (always start with PYTHONHASHSEED=0)"]),
        ({"hash_seed": "random"}, {"hash_seed": "random"}, []),
        (
            {"hash_seed": "random", "names": {"a.b": "1"}},
            {"hash_seed": "random", "names": {"a.b": "2"}},
            ["is drawn at random (always start with PYTHONHASHSEED=0); other names"],
        ),
        ({"hash_seed": "7", "num_samples": {"train": 9}}, {"hash_seed": "7", "num_samples": {"train": 9}}, []),
    ],
)
def test_what_another_rank_has_built_is_compared(first, second, said, pair):
    here, there = pair.run(checked, (first, second))
    assert here == there
    if isinstance(said, str):
        assert said in here
    else:
        assert len(here) == len(said) and all(text in note for text, note in zip(said, here, strict=True))


def test_a_checkpoint_without_a_record_is_compared_with_nothing():
    assert compare_with_checkpoint({}, {"hash_seed": "0", "num_samples": {"val": 3}, "names": {"a": "1"}}) == []


@pytest.mark.parametrize(
    ("value", "counts"),
    [
        (NAMES, True),
        (tuple(NAMES), True),
        ({"cat": 0, "dog": 1}, True),
        (collections.OrderedDict(cat=0), True),
        ([], False),
        (["cat", 3], False),
        ({"cat": True}, False),  # a task's notes
        ({"cat": 0.5}, False),
        (["/data/0.png", "/data/1.png"], False),  # may lie elsewhere on another host
        ({"s3://bucket/0": 0}, False),
        ("cat", False),
        ({"cat", "dog"}, False),  # has no order to compare
    ],
)
def test_lists_of_names_and_numbers_by_name_are_compared(value, counts):
    task = SimpleNamespace(classes=value)
    found = names_of(task, {"train": TensorDataset(torch.zeros(2))})  # type: ignore[arg-type]
    assert ("SimpleNamespace.classes" in found) is counts


def test_the_order_of_names_counts_and_that_of_numbers_by_name_does_not():
    def found(value: Any) -> str:
        return names_of(SimpleNamespace(classes=value), {})["SimpleNamespace.classes"]  # type: ignore[arg-type]

    assert found(NAMES) != found(NAMES[::-1])
    assert found({"cat": 0, "dog": 1}) == found({"dog": 1, "cat": 0}) != found({"cat": 1, "dog": 0})


def test_names_are_found_in_data_sets_that_others_wrap():
    inner = TensorDataset(torch.zeros(4))
    inner.classes = NAMES  # type: ignore[attr-defined]
    found = names_of(SimpleNamespace(), {"train": ConcatDataset([Subset(inner, [0]), inner])})  # type: ignore[arg-type]
    assert {"train.datasets[0].dataset.classes", "train.datasets[1].classes"} <= set(found)


class Projects(torch.nn.Module):
    def __init__(self, **held: Any) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.register_buffer("mean", torch.rand(2))
        self.weights = [self.linear.weight]
        vars(self).update(held)


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        ({"projection": np.zeros(3)}, {"projection": np.ones(3)}, ["Sequential.0.projection"]),
        ({"anchors": [np.zeros(3), np.ones(3)]}, {"anchors": [np.ones(3), np.zeros(3)]}, ["Sequential.0.anchors"]),
        ({"by_level": {"p3": torch.zeros(2)}}, {"by_level": {"p3": torch.zeros(3)}}, ["Sequential.0.by_level"]),
        ({"priors": torch.zeros(2)}, {"priors": torch.zeros(2, dtype=torch.int64)}, ["Sequential.0.priors"]),
        ({"weights": torch.rand(2, requires_grad=True) * 2}, {"weights": None}, []),  # what a forward left behind
        ({"path": "/home/a/" + 50 * "x"}, {"path": "/home/b/" + 50 * "x"}, []),
        ({"built_s": 1.5}, {"built_s": 2.5}, []),
        ({}, {}, []),
    ],
)
def test_arrays_that_a_model_holds_besides_its_buffers_are_compared(one, other, differ):
    def found(held: dict[str, Any]) -> dict[str, str]:
        return arrays_of(SimpleNamespace(), torch.nn.Sequential(Projects(**held)), {})  # type: ignore[arg-type]

    first, second = found(one), found(other)
    assert [name for name in first if first[name] != second.get(name)] == differ
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.anchors = np.zeros(3)  # type: ignore[assignment]
    assert list(arrays_of(SimpleNamespace(), model, {})) == ["Sequential.anchors"]  # type: ignore[arg-type]


def test_the_first_the_middle_and_the_last_sample_are_looked_at_in_batches_of_the_run():
    assert [key.ids for key in probe_keys(24, 4)] == [(0, 12, 23)]
    assert [key.ids for key in probe_keys(24, 2)] == [(0, 12), (23,)]
    assert [key.ids for key in probe_keys(2, 1)] == [(0,), (1,)]
    assert [key.ids for key in probe_keys(1, 8)] == [(0,)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2), torch.tensor([0.0, -0.0])),
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
        (np.zeros(3), np.ones(3)),
        (np.array(["cat", "dog"]), np.array(["dog", "cat"])),
        ("cat", "dog"),
        (1, 1.0),
        (None, 0),
    ],
)
def test_values_that_differ_in_a_bit_have_another_hash(one, other):
    assert hash_of(one) != hash_of(other) and hash_of(one) == hash_of(one) is not None


def test_what_cannot_be_seen_into_is_not_compared():
    assert hash_of(object()) is None
    assert hash_of(torch.eye(2).to_sparse()) is None
    assert hash_of(np.array([object()], dtype=object)) is None


def test_fields_are_named_by_how_they_are_reached():
    point = collections.namedtuple("point", "x")
    batch = {"image": 1, "boxes": [{"label": 2}, point(3)]}
    assert list(fields_of(batch)) == [("image", 1), ("boxes.0.label", 2), ("boxes.1.0", 3)]
    assert list(fields_of(5)) == [("", 5)]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a command, but for the first; files in `build`, beside the config, have the task build something otherwise."""
    folder = tmp_path_factory.mktemp("animals")
    (folder / "build").mkdir()
    (folder / "animals.yaml").write_text(
        f"TASK: tasks_that_differ:AnimalsTask\nDATA_CONFIG: {{BUILD: {folder / 'build'}}}\n"
        "OPTIMIZATION: {BATCH_SIZE_PER_GPU: 4, NUM_EPOCHS: 1}\nSCALE: {USE_GPU: false, VIRTUAL_WORKERS: 2}\n"
        "LOADER: {WORKERS: 1}\nLOG: {EVERY: 1}\n"
    )
    return ["--cfg_file", str(folder / "animals.yaml"), "--output", str(folder / "output")]


@pytest.mark.ray
def test_sets_have_one_order_in_all_processes_of_a_run_in_one_that_goes_on_and_in_an_evaluation(words, tmp_path):
    """On Ray, then in one process, with loader workers; none of these is started with a seed."""
    folder, bare = Path(words[1]).parent, {"PYTHONHASHSEED": ""}
    (folder / "build" / "weights").touch()
    said = commanded(["train", *words, "--num_workers", "2"], tmp_path, bare).ended(0)
    assert "build_model gave other values on rank 1 than on rank 0, whose are taken: bias. Likely" in said
    (folder / "build" / "weights").rename(folder / "build" / "file")
    assert "hash seed" not in said and "other names" not in said and "hold other values" not in said
    run_dir = next((folder / "output").rglob("journal.jsonl")).parent
    said = commanded(["train", *words, "--num_workers", "0", "--epochs", "2"], tmp_path, bare).ended(0)
    assert "checkpoint was made: samples 0, 12, 23 of train hold other values in x. Likely" in said
    said = commanded(["eval", *words], tmp_path, bare).ended(0)
    assert len({record["terms"]["order"] for record in journal(run_dir, "step")}) == 1 and "not as it was" not in said
    said = commanded(["eval", *words], tmp_path, {"PYTHONHASHSEED": "5"}).ended(0)
    assert "the hash seed, by which sets are ordered, is 5, not 0 (start with PYTHONHASHSEED=0)" in said
    assert "other names, or in another order, in tasks_that_differ.CLASSES" in said


@pytest.mark.ray
def test_under_torchrun_data_of_another_length_on_another_rank_is_refused(words, tmp_path):
    (Path(words[1]).parent / "build" / "longer_elsewhere").touch()
    said = torchrun(["-m", "raytrain", "train", *words, "--extra_tag", "longer"], tmp_path).ended(1)
    assert "26 samples of train and 10 samples of val on rank 1 and 24 samples of train and 8 samples of val on" in said


def test_a_sample_that_depends_on_the_loader_worker_that_makes_it_is_told(tmp_path: Path) -> None:
    by_two = config(tmp_path, "", {}, TASK="tasks_that_surprise:SeedsByLoaderWorker", LOADER={"WORKERS": 2})
    (note,) = [note for note in notes(train(by_two).run_dir) if "loader worker" in note]
    assert note.startswith("one loader worker and another do not make the same: samples 0, 6, 11 of train hold other")


def test_loader_workers_have_the_default_type_that_the_task_has_set(tmp_path: Path) -> None:
    states = []
    for workers in (0, 2):
        loader = {"WORKERS": workers}
        cfg = config(tmp_path / str(workers), "", {}, TASK="tasks_that_surprise:DoublesTask", LOADER=loader)
        result = train(cfg)
        assert not [note for note in notes(result.run_dir) if "loader worker" in note]
        states.append(saved_state(result.checkpoint))
    assert_same_bits(*states)
    assert torch.get_default_dtype() is torch.float32, "it is put back after a run"
