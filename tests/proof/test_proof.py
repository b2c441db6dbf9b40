"""`raytrain prove`: what is right agrees; what is wrong is named, with what to write instead."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from commands import ROOT, commanded, family, gone, wait_for
from pillars_for_tests import CONFIG as PILLARS

pytestmark = pytest.mark.ray


class Wrong(NamedTuple):
    """A task, the ways that find it out, and what is to be said of each."""

    task: str
    ways: str
    says: tuple[str, ...]


SEEDED = "draws from random, numpy.random, torch or a generator that is an attribute of the data set"
BY_PROGRESS = "Read self.progress (epoch, step, share) instead, or write state_dict() and load_state_dict(state) in"
NO_CHECKPOINT = "no checkpoint holds it"
WRONG = [
    Wrong(
        "AsksTheClock", "again", ("in step 1: sample ", "(field 'x', epoch 0)", SEEDED, "differs each time it is made")
    ),
    Wrong("DrawsAnOrder", "again", ("step 1: sample ", "held otherwise there: Shuffled.order", SEEDED)),
    Wrong("DrawsWeights", "again", ("first.weight as the run begins", "Let build_model draw from torch")),
    Wrong("DrawsOfTheSystem", "again", ("step 1: the loss of virtual worker 0", "Let model_func draw from torch")),
    Wrong("KeepsAFile", "again", ("the loss of virtual worker 0", "in place of a clock, a file")),
    Wrong("CountsFiles", "again", ("32 samples to train on straight, 40 here", "What build_dataset counts")),
    Wrong(
        "DrawsInBackward",
        "again",
        ("in step 1: the gradient of norm.weight", "virtual worker 0, where the loss is the"),
    ),
    Wrong("HoldsAClock", "again", ("in step 1: what the step leaves in seconds", "Let model_func draw from torch")),
    Wrong(
        "CountsSteps",
        "resumed workers",
        (
            "step 5: the loss of virtual worker 0",
            f"CountsSteps.steps (8 straight, 0 here); {NO_CHECKPOINT}",
            f"{BY_PROGRESS} CountsSteps",
            "on 2 worker processes: first not the same, in step 1: the loss of virtual worker 1",
            "CountsSteps.steps (2 straight, 1 here)",
        ),
    ),
    Wrong(
        "CountsInTheModule",
        "resumed",
        (
            "the loss of",
            "tasks_to_prove.taken (8 straight, 0 here)",
            NO_CHECKPOINT,
            "Hold it in CountsInTheModule as self.NAME",
        ),
    ),
    Wrong("DrawsFromAnIterator", "resumed", ("step 5: the loss of", "an iterator, a file, a library's own state")),
    Wrong(
        "CachesAugmentation",
        "resumed",
        ("step 5: sample ", "(field 'x', epoch 1)", "Cached.cache", "Let a sample depend on its id", "in Cached and"),
    ),
    Wrong("HasAMomentumEncoder", "resumed", ("the loss of", "MomentumInAList.slow", "modules in nn.ModuleList")),
    Wrong("HasAQueue", "resumed", ("the loss of", "QueueAsAnAttribute.queue", "register_buffer()")),
    Wrong("HasABufferThatIsNotSaved", "resumed", ("centre after step 4", "without persistent=False")),
    Wrong("FreezesOnce", "resumed", ("Net.norm.training (False straight, True here)", "whenever model_func is called")),
    Wrong("AsksForTheLoader", "loaders", ("step 1: sample ", "field 'x'", "not depend on get_worker_info()")),
    Wrong("MixesWithTheLast", "loaders", ("step 1: sample ", "Mixed.before", "Let a sample depend on its id")),
    Wrong("NumbersASet", "hash_seed", ("step 1: sample ", "field 'y'", "tasks_to_prove.NUMBER_OF", "sorted(...)")),
    Wrong("HashesNames", "hash_seed", ("step 1: sample ", "field 'y'", "hashlib where a hash has to last")),
    Wrong(
        "AsksForTheRank",
        "workers",
        ("the loss of virtual worker 1", "tasks_to_prove.py:", "(get_rank)", "not depend on the rank"),
    ),
    Wrong(
        "AsksForTheWorldSize",
        "workers",
        ("the loss of virtual worker 0", "(get_world_size)", "how many workers there are"),
    ),
    Wrong("CountsBatches", "workers", ("CountsBatches.steps (2 straight, 1 here)", "Each worker process has its own")),
]


def small(task: str, folder: Path, scale: str = "") -> list[str]:
    """The command on 8 steps, of which an epoch has 3."""
    config = folder / "small.yaml"
    config.write_text(
        f"TASK: tasks_to_prove:{task}\n"
        f"DATA_CONFIG: {{FOLDER: {folder}}}\n"
        "OPTIMIZATION: {BATCH_SIZE_PER_GPU: 4, NUM_EPOCHS: 4, LR: 0.1}\n"
        f"SCALE: {{USE_GPU: false{scale}}}\n"
        "LOADER: {WORKERS: 0}\n"
    )
    return ["prove", "--cfg_file", str(config), "--steps", "8"]


def prove(task: str, folder: Path, *words: str, status: int = 0, scale: str = "") -> str:
    """What the command says."""
    return commanded([*small(task, folder, scale), *words], folder).ended(status)


def test_a_task_that_is_right_agrees_in_all_ways_and_leaves_nothing(tmp_path):
    said = prove("Right", tmp_path)
    assert said.count(" agrees\n") == 5
    assert "all agree: 8 steps gave the same bits in 5 other ways" in said
    assert {path.suffix for path in tmp_path.iterdir()} == {".yaml", ".txt"}, "the run folder is not touched"


def test_what_is_shipped_agrees_in_all_ways(tmp_path):
    digits = ["prove", "--cfg_file", str(ROOT / "configs" / "digits.yaml"), "--output", str(tmp_path)]
    said = commanded([*digits, "--steps", "30"], tmp_path).ended(0)
    assert "digits: 30 steps, 2 virtual workers, cpu" in said
    assert "all agree: 30 steps gave the same bits in 5 other ways" in said


@pytest.mark.parametrize("ways", ["again resumed hash_seed", "loaders workers"])
def test_a_detector_agrees_in_all_ways(ways, tmp_path):
    """With all augmentations; one that ends with the first epoch, of 6 steps."""
    task = {"TASK": "raytrain.tasks.pointpillars.task:PointPillars"}
    tree = {**PILLARS, **task, "OPTIMIZATION": {"BATCH_SIZE_PER_GPU": 2, "NUM_EPOCHS": 2}}
    (tmp_path / "pillars.yaml").write_text(yaml.safe_dump(tree))
    words = ["prove", "--cfg_file", "pillars.yaml", "--steps", "7", "--no_gpu", "--only", *ways.split()]
    said = commanded(words, tmp_path).ended(0)
    assert f"all agree: 7 steps gave the same bits in {len(ways.split())} other ways" in said


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.task)
def test_what_is_wrong_is_named_with_what_to_write_instead(wrong, tmp_path):
    said = prove(wrong.task, tmp_path, "--only", *wrong.ways.split(), status=1)
    assert [text for text in wrong.says if text not in said] == [], said


def test_three_virtual_workers_are_tried_on_two_processes_and_on_three(tmp_path):
    said = prove("Right", tmp_path, "--only", "workers", scale=", VIRTUAL_WORKERS: 3, NUM_WORKERS: 1")
    assert "small: 8 steps, 3 virtual workers, cpu" in said
    assert "on 2 worker processes            agrees" in said
    assert "on 3 worker processes            agrees" in said


def test_what_cannot_be_tried_says_why_and_is_no_difference(tmp_path):
    said = prove("KeepsItsCount", tmp_path, "--only", "loaders", "resumed")
    assert "with 2 loader workers            not tried: the data set has a state (state_dict)" in said
    assert "all agree: 8 steps gave the same bits in 1 other way (" in said
    said = prove("GoesToNoLoader", tmp_path, "--only", "loaders")
    assert "with 2 loader workers            refused, and the config has none: " in said
    assert "go to 2 loader workers by pickle" in said
    said = prove("Right", tmp_path, "--only", "workers", "--set", "SCALE.EXACT", "false")
    assert "not tried: SCALE.EXACT is false" in said


def test_a_way_that_hangs_is_given_up_and_told_with_the_line_it_stands_in(tmp_path):
    said = prove("WaitsForTheOther", tmp_path, "--only", "workers", "--timeout", "15", status=1)
    assert "on 2 worker processes            fails" in said
    assert "fails, as it does not straight: not done after 15 s, where straight took " in said
    assert "; rank 0 is in " in said and "weight (" in said, said


def test_a_task_that_fails_straight_is_told_as_a_failed_run_is(tmp_path):
    said = prove("FailsAtOnce", tmp_path, status=1)
    assert "raytrain: Training failed on rank 0 at step 1 (epoch 1)" in said
    assert "ValueError: no boxes in this batch" in said
    assert "TASK 'tasks_to_prove:Nobody'" in prove("Nobody", tmp_path, status=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_is_left_of_one_that_is_stopped(number, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    launched = commanded(small("Waits", tmp_path), tmp_path, {"TMPDIR": str(scratch)})
    wait_for(lambda: (tmp_path / "waits.flag").exists(), "the third step")
    started = set(family(launched.pid)) - {launched.pid}
    assert len(started) > 1
    os.kill(launched.pid, number)
    said = launched.ended(-number if number == signal.SIGKILL else 1)
    gone(started)
    if number != signal.SIGKILL:  # which leaves its files to the next process
        assert "stopped; of what was tried nothing is left" in said
        assert list(scratch.iterdir()) == []
