"""A run whose workers become fewer and more ends with the bits of one that was left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import Launched, wait_for
from ray_nodes import ray_nodes
from runs import Run, assert_same_bits, assert_uses_once

from raytrain.cli import main

pytestmark = pytest.mark.ray

VIRTUAL, EPOCHS, SAMPLES = 4, 4, 1600  # 400 steps of 16 samples
ELASTIC: dict[str, Any] = {
    "TASK": "tasks_for_faults:Named",
    "DATA_CONFIG.NUM_SAMPLES": SAMPLES,
    "OPTIMIZATION.NUM_EPOCHS": EPOCHS,
    "CHECKPOINT.EVERY_STEPS": None,
    "CHECKPOINT.SNAPSHOT_EVERY": 1,
    "SCALE.VIRTUAL_WORKERS": VIRTUAL,
    "SCALE.GROW_EVERY": 1,
}
LAST = f"checkpoint_epoch_{EPOCHS}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four virtual workers in one process."""
    run = Run(tmp_path_factory.mktemp("undisturbed"), ELASTIC)
    assert main(run.words("--num_workers", "0")) == 0
    return run


def test_a_run_shrinks_and_grows_with_its_cluster_and_ends_with_the_same_bits(tmp_path: Path, undisturbed: Run) -> None:
    run = Run(tmp_path, ELASTIC)
    (run.gate / "slow").write_text("0.1")
    with ray_nodes() as nodes:
        first = nodes.add()
        launched = run.start("--address", nodes.address, "--num_workers", "2-4")
        wait_for_steps(run, 3, launched)
        nodes.add()
        resized(run, [(2, 4)], launched)
        nodes.drain(first)
        resized(run, [(2, 4), (4, 2)], launched)
        nodes.add()
        resized(run, [(2, 4), (4, 2), (2, 4)], launched)
        nodes.kill()
        resized(run, [(2, 4), (4, 2), (2, 4), (4, 2)], launched)
        (run.gate / "slow").unlink()
        print(launched.ended(0))
    print([(r["from"], r["to"], r["seconds"], r["planned"]) for r in resizes(run)])
    assert_same_bits(run.payload(LAST), undisturbed.payload(LAST))
    assert_uses_once(run, VIRTUAL, EPOCHS, SAMPLES)
    assert [record["planned"] for record in resizes(run)] == [True, True, True, False]
    assert repeated(run) <= 1, "the step under way as the node was killed, and no other"


def resizes(run: Run) -> list[dict[str, Any]]:
    return [record for record in run.records("event") if record["event"] == "resize"]


def resized(run: Run, changes: list[tuple[int, int]], launched: Launched) -> None:
    """Returns once the journal tells of these changes of the number of workers."""

    def told() -> bool:
        assert launched.process.poll() is None, launched.output()
        return [(record["from"], record["to"]) for record in resizes(run)] == changes

    wait_for(told, f"{changes}; {launched.output()}")


def steps_begun(run: Run) -> list[int]:
    """The step of each pass of a virtual worker, in their order."""
    uses = run.gate / "uses.txt"
    return [int(line.split()[0]) for line in uses.read_text().splitlines()] if uses.exists() else []


def wait_for_steps(run: Run, count: int, launched: Launched) -> None:
    """Until that many more have begun than at any time before."""
    goal = max(steps_begun(run), default=-1) + count

    def reached() -> bool:
        assert launched.process.poll() is None, launched.output()
        return max(steps_begun(run), default=-1) >= goal

    wait_for(reached, f"step {goal}; {launched.output()}")


def repeated(run: Run) -> int:
    """How many steps were begun again, all in all."""
    begun = steps_begun(run)
    return sum(-(-begun.count(step) // VIRTUAL) - 1 for step in set(begun))
