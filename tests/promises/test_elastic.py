"""A run whose workers become fewer and more ends with the bits of one that was left alone."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Launched, alive, gone, wait_for
from ray_nodes import Nodes, ray_nodes
from runs import Run, assert_same_bits, assert_uses_once, steps_repeated, wait_for_steps

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


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A cluster without a node to train on, yet; what one test leaves there the next one has."""
    with ray_nodes() as nodes:
        yield nodes


def test_a_run_shrinks_and_grows_with_its_cluster_and_ends_with_the_same_bits(
    tmp_path: Path, undisturbed: Run, nodes: Nodes
) -> None:
    run = Run(tmp_path, {**ELASTIC, "LOADER.WORKERS": 1})  # they end with each change, and start again
    (run.gate / "slow").write_text("0.1")
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
    said = launched.ended(0)
    assert said.count("2 of 2-4 workers (cpu)") == 3 and said.count("4 of 2-4 workers (cpu)") == 2
    assert said.count("stopped") == 0 and said.count("restart: ") == 1, "what is planned is told as a resize alone"
    assert_same_bits(run.payload(LAST), undisturbed.payload(LAST))
    assert_uses_once(run, VIRTUAL, EPOCHS, SAMPLES)
    print("seconds of each change:", [round(record["seconds"], 1) for record in resizes(run)])
    assert [record["planned"] for record in resizes(run)] == [True, True, True, False]
    assert steps_repeated(run, VIRTUAL) <= 1, "the step under way as the node was killed, and no other"
    assert [record["num_workers"] for record in run.lines("run")] == [2, 4, 2, 4, 2]


def test_a_cluster_that_changes_in_a_storm_of_kills_changes_no_bit(
    tmp_path: Path, undisturbed: Run, nodes: Nodes
) -> None:
    run = Run(tmp_path, {**ELASTIC, "SCALE.MAX_FAILURES": -1})
    seed = os.environ.get("STORM_SEED") or str(random.SystemRandom().randrange(1000))
    print(f"once more the same: STORM_SEED={seed}")
    storm = Storm(run, random.Random(seed))
    (run.gate / "slow").write_text("0.1")
    first = nodes.add()
    storm.launched = run.start("--address", nodes.address, "--num_workers", "1-4")
    storm.until(4)
    nodes.kill()
    storm.until(2)
    nodes.add()
    storm.until(4)
    storm.kill()
    (run.gate / "slow").unlink()
    storm.launched.ended(0)
    print(f"{storm.kills} kills, sizes {[record['num_workers'] for record in run.lines('run')]}, {first}")
    assert storm.kills >= 4
    assert_same_bits(run.payload(LAST), undisturbed.payload(LAST))
    assert_uses_once(run, VIRTUAL, EPOCHS, SAMPLES)
    assert steps_repeated(run, VIRTUAL) <= storm.kills + 1


class Storm:
    """Kills one of the workers of a run every few steps, while it waits for something."""

    launched: Launched

    def __init__(self, run: Run, chance: random.Random) -> None:
        self.run, self.chance, self.kills = run, chance, 0

    def until(self, num_workers: int) -> None:
        """Returns once so many have trained."""

        def reached() -> bool:
            wait_for_steps(self.run, 2, self.launched)
            if self.run.lines("run")[-1]["num_workers"] == num_workers:
                return True
            wait_for_steps(self.run, self.chance.randrange(8, 16), self.launched)
            self.kill()
            return False

        wait_for(reached, f"{num_workers} workers")
        self.kill()

    def kill(self) -> None:
        """SIGKILL for one that trains."""
        pids = [int(path.read_text() or 0) for path in self.run.gate.glob("rank-*")]
        pid = self.chance.choice(sorted(filter(alive, pids)))
        os.kill(pid, signal.SIGKILL)
        gone({pid})
        self.kills += 1


def resizes(run: Run) -> list[dict[str, Any]]:
    return [record for record in run.records("event") if record["event"] == "resize"]


def resized(run: Run, changes: list[tuple[int, int]], launched: Launched) -> None:
    """Returns once the journal tells of these changes of the number of workers."""

    def told() -> bool:
        assert launched.process.poll() is None, launched.output()
        return [(record["from"], record["to"]) for record in resizes(run)] == changes

    wait_for(told, f"{changes}; {launched.output()}")
