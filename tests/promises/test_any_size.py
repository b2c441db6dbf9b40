"""The weights are a function of config, seed and virtual workers: at every checkpoint, whatever hosts and kills them.

`pytest -m wide tests/promises/test_any_size.py` tries every number of processes and every way to compute; the tests
that always run try one that cuts the tree unevenly.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from commands import torchrun
from pillars_for_tests import CONFIG as PILLARS
from runs import EPOCHS, Run, assert_same_bits

from raytrain.cli import main

pytestmark = pytest.mark.ray

SAMPLES = 168  # of points
TASKS: dict[str, dict[str, Any]] = {
    "points": {"DATA_CONFIG.NUM_SAMPLES": SAMPLES, "CHECKPOINT.METRIC": "accuracy"},
    "LiDAR": {**PILLARS, "CHECKPOINT.METRIC": "Car_3d/moderate_R40", "EVAL": {"PICTURES": 0}},
}
BATCH = {"points": {4: 6, 7: 4}, "LiDAR": {4: 2, 7: 1}}  # points: 7 and 6 steps an epoch, none padded; LiDAR: 3 and 4
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"OPTIMIZATION.ACCUMULATE": 2},
    "ddp": {"OPTIMIZATION.ENGINE": "ddp"},
    "bf16": {"OPTIMIZATION.USE_AMP": True, "OPTIMIZATION.AMP_DTYPE": "bf16"},
    "fp16": {"OPTIMIZATION.USE_AMP": True, "OPTIMIZATION.LOSS_SCALE_FP16": 2.0**8},
    "phases": {"OPTIMIZATION.PHASES": [{"FROM_EPOCH": 1, "LR": 0.003, "GRAD_NORM_CLIP": 0.1, "WEIGHT_DECAY": 0.1}]},
    "mean of buffers": {"OPTIMIZATION.BUFFERS": "mean"},
    "bad steps": {"TASK": "tasks_for_tests:Poisoned"},
    "a rollback": {
        "TASK": "tasks_for_tests:Poisoned",
        "OPTIMIZATION.NONFINITE": "rollback",
        "OPTIMIZATION.ROLLBACK_EVERY": 2,
    },
}


class Found(NamedTuple):
    """What is left of a run: the fingerprint of each checkpoint; the last one itself; by step, the samples that
    made the weights."""

    weights: dict[str, str]
    payload: dict[str, Any]
    samples: dict[int, list[int]]


def run_of(folder: Path, task: str, virtual_workers: int, variant: str, reduction: str = "auto") -> Run:
    """With augmentation, BatchNorm, dropout and a loader worker for each process; a checkpoint every third step."""
    changes = {
        **TASKS[task],
        **VARIANTS[variant],
        "OPTIMIZATION.BATCH_SIZE_PER_GPU": BATCH[task][virtual_workers],
        "SCALE.VIRTUAL_WORKERS": virtual_workers,
        "SCALE.CPUS_PER_WORKER": 0.25,  # eight on two cores
        "SCALE.REDUCTION": reduction,
        "CHECKPOINT.EVERY_STEPS": 3,
        "CHECKPOINT.KEEP_LAST": 99,
        "LOADER.WORKERS": 1,
    }
    if task == "LiDAR":
        changes = {key: value for key, value in changes.items() if not key.startswith("DATA_CONFIG.")}
    run = Run(folder, changes)
    if VARIANTS[variant].get("TASK"):
        (run.gate / "poison").write_text("1 3 17 44")
    return run


def launch(run: Run, by: str, num_workers: int, status: int = 0) -> None:
    """By torchrun; or by Ray, on the cluster that this process is connected to; 0 workers: in this process."""
    if by == "torchrun":
        words = ["-m", "raytrain", *run.words()]
        torchrun(words, run.folder, "--nproc_per_node", str(num_workers)).ended(status)
    else:
        assert main(run.words("--num_workers", str(num_workers))) == status


def assert_is(run: Run, expected: Found, task: str) -> None:
    is_now = found(run)
    both = is_now.weights.keys() & expected.weights.keys()  # one that comes while another is written is left out
    assert both >= {f"checkpoint_epoch_{epoch + 1}" for epoch in range(EPOCHS)}
    assert {name: is_now.weights[name] for name in both} == {name: expected.weights[name] for name in both}
    assert_same_bits(is_now.payload, expected.payload)
    assert is_now.samples == expected.samples
    used = [i for ids in is_now.samples.values() for i in ids]
    if task == "points" and not (run.gate / "poison").exists():  # the detector's last step is padded
        assert {used.count(i) for i in range(SAMPLES)} == {EPOCHS}


def found(run: Run) -> Found:
    manifests = run.ckpt.glob("checkpoint_*/manifest.json")
    weights = {path.parent.name: json.loads(path.read_text())["weights"] for path in manifests}
    # Of a step that was taken twice, the later passes count.
    passes: dict[int, list[list[int]]] = {}
    for line in (run.gate / "uses.txt").read_text().splitlines():
        step, _, ids = line.split()
        passes.setdefault(int(step), []).append([int(i) for i in ids.split(",")])
    count = min(map(len, passes.values()))
    samples = {step: sorted(i for ids in each[-count:] for i in ids) for step, each in passes.items()}
    return Found(weights, run.payload(), samples)


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, str], Found]:
    """What one process trains with these virtual workers, each made once."""
    made: dict[tuple[str, int, str], Found] = {}

    def of(*key: Any) -> Found:
        if key not in made:
            run = run_of(tmp_path_factory.mktemp("one"), *key)
            launch(run, "Ray", 0)
            made[key] = found(run)
        return made[key]

    return of


def test_a_detector_on_four_processes_killed_then_on_one_then_on_three_has_the_bits_of_one(
    tmp_path: Path, in_one_process: Callable[[str, int, str], Found]
) -> None:
    """Seven virtual workers: 2 + 2 + 2 + 1, 7, 3 + 2 + 2. Ray, in the process itself, torchrun."""
    expected = in_one_process("LiDAR", 7, "plain")
    run = run_of(tmp_path, "LiDAR", 7, "plain")
    run.killed_at(4, "--num_workers", "4", processes=4)
    (run.gate / "fail").write_text("8")
    launch(run, "Ray", 0, status=1)
    (run.gate / "fail").unlink()
    launch(run, "torchrun", 3)
    assert [record["num_workers"] for record in run.lines("run")] == [4, 0, 3]
    assert_is(run, expected, "LiDAR")


SIZES = [("Ray", size) for size in range(1, 8)] + [("torchrun", size) for size in (2, 3, 5)]


@pytest.mark.wide
@pytest.mark.usefixtures("ray_address")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("by", "num_workers"), SIZES)
@pytest.mark.parametrize("virtual_workers", [4, 7])
def test_any_number_of_processes_ends_with_the_bits_of_one(
    tmp_path: Path,
    in_one_process: Callable[[str, int, str], Found],
    task: str,
    virtual_workers: int,
    by: str,
    num_workers: int,
) -> None:
    if num_workers > virtual_workers:
        pytest.skip("more processes than virtual workers are refused")
    expected = in_one_process(task, virtual_workers, "plain")
    run = run_of(tmp_path, task, virtual_workers, "plain")
    launch(run, by, num_workers)
    assert_is(run, expected, task)


@pytest.mark.wide
@pytest.mark.usefixtures("ray_address")
@pytest.mark.parametrize("reduction", ["shared_memory", "collective"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("by", ["Ray", "torchrun"])
@pytest.mark.parametrize("task", TASKS)
def test_every_way_to_compute_ends_with_the_bits_of_one_process(
    tmp_path: Path,
    in_one_process: Callable[[str, int, str], Found],
    task: str,
    by: str,
    variant: str,
    reduction: str,
) -> None:
    if task == "LiDAR" and "TASK" in VARIANTS[variant]:
        pytest.skip("the bad samples are those of the points")
    expected = in_one_process(task, 7, variant)
    run = run_of(tmp_path, task, 7, variant, reduction)
    launch(run, by, 3)
    if VARIANTS[variant].get("TASK"):
        assert run.records("event"), "a step was bad"
    assert_is(run, expected, task)


@pytest.mark.wide
@pytest.mark.usefixtures("ray_address")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", TASKS)
def test_sizes_that_change_in_mid_epoch_with_kills_between_change_no_bit(
    tmp_path: Path, in_one_process: Callable[[str, int, str], Found], task: str, variant: str
) -> None:
    if task == "LiDAR" and "TASK" in VARIANTS[variant]:
        pytest.skip("the bad samples are those of the points")
    expected = in_one_process(task, 7, variant)
    run = run_of(tmp_path, task, 7, variant)
    run.killed_at(4, "--num_workers", "4", processes=4)
    run.killed_at(5, "--num_workers", "0")
    launch(run, "Ray", 3)
    assert_is(run, expected, task)
