"""Runs that are disturbed on purpose, and what is left of them."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import processes
import torch
import yaml
from commands import Launched, children_of, commanded, family, gone, wait_for
from tensorboard_events import events_of

from raytrain.journal.records import read_journal

EPOCHS = 3
SAMPLES = 44  # over 2 virtual workers: 5 whole batches of 4, and one of 2

CONFIG: dict[str, Any] = {
    "TASK": "tasks_for_tests:Exact",
    "SEED": 3,
    "TAG": "run",
    "EXP_GROUP_PATH": "",
    "DATA_CONFIG": {"NUM_SAMPLES": SAMPLES},
    "OPTIMIZATION": {"BATCH_SIZE_PER_GPU": 4, "NUM_EPOCHS": EPOCHS, "LR": 0.01, "GRAD_NORM_CLIP": 1.0},
    "SCALE": {"USE_GPU": False},
    "LOADER": {"WORKERS": 0},
    # Mid-epoch checkpoints, also where the epoch has 6 steps (2 virtual workers) or 11 (one).
    # What memory keeps beside them is tried by the tests that turn it on.
    "CHECKPOINT": {"EVERY_STEPS": 4, "KEEP_LAST": 3, "KEEP_BEST": 1, "METRIC": "accuracy", "SNAPSHOT_EVERY": None},
    "LOG": {"EVERY": 1},
}
# Plain SGD in powers of two: the ledger of tasks_for_tests.Exact then counts exactly.
LEDGER = {
    "OPTIMIZATION.OPTIMIZER": "sgd",
    "OPTIMIZATION.SCHEDULER": "constant",
    "OPTIMIZATION.LR": 0.125,
    "OPTIMIZATION.MOMENTUM": 0.0,
    "OPTIMIZATION.WEIGHT_DECAY": 0.0,
    "OPTIMIZATION.GRAD_NORM_CLIP": None,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A config in a folder of its own, launched from there; its gate can hold it at a step."""

    folder: Path
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gate.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(CONFIG)
        config["DATA_CONFIG"]["GATE"] = str(self.gate)
        for dotted, value in self.changes.items():
            section, _, key = dotted.rpartition(".")
            (config[section] if section else config)[key] = value
        self.config_file.write_text(yaml.safe_dump(config))

    def copied(self, folder: Path) -> Run:
        """As it stands, to go on in another folder."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Run(folder, self.changes)

    @property
    def config_file(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def gate(self) -> Path:
        return self.folder / "gate"

    @property
    def run_dir(self) -> Path:
        return self.folder / "output" / "run" / "default"

    @property
    def ckpt(self) -> Path:
        return self.run_dir / "ckpt"

    def words(self, *flags: str) -> list[str]:
        """The arguments of the command, which are the same at every launch."""
        return ["train", "--cfg_file", str(self.config_file), "--output", str(self.folder / "output"), *flags]

    def start(self, *flags: str, env: Mapping[str, str] | None = None) -> Launched:
        """The command, running in a process group of its own."""
        return commanded(self.words(*flags), self.folder, env)

    def run(self, *flags: str, status: int = 0) -> str:
        """What the command printed, once it has ended with this exit status."""
        return self.start(*flags).ended(status)

    def killed_at(self, step: int, *flags: str, processes: int = 1, workers_too: bool = True) -> None:
        """The command, with SIGKILL for driver and workers while the step after `step` steps is under way."""
        self.hold(step)
        launched = self.start(*flags)
        launched.kill(self.held(processes, launched), workers_too)
        wait_for(lambda: not keepers_of(self), "the end of the keeper, which still writes what was begun")
        self.release()
        for path in self.gate.glob("held-*"):
            path.unlink(missing_ok=True)

    def with_a_worker_killed_at(self, step: int, address: str | None, rank: int, status: int = 0) -> str:
        """What the command on two workers printed; the one of this rank was killed in the step after `step` steps.

        On a cluster of its own if there is no address.
        """
        self.hold(step)
        launched = self.start("--num_workers", "2", *(["--address", address] if address else []))
        pids = self.held(2, launched)
        first = int((self.run_dir / ".lock").read_text().split()[1])
        victim = first if rank == 0 else next(pid for pid in pids if pid != first)
        below = {pid for root in pids for pid in family(root)}
        os.kill(victim, signal.SIGKILL)
        self.release()
        said = launched.ended(status)
        gone(below)
        return said

    def hold(self, step: int) -> None:
        """Training passes after that many steps wait from now on."""
        (self.gate / "hold").write_text(str(step))

    def release(self, slow_s: float | None = None) -> None:
        """They go on; each takes slow_s from now on."""
        if slow_s is not None:
            (self.gate / "slow").write_text(str(slow_s))
        (self.gate / "hold").unlink()

    def held(self, count: int, launched: Launched) -> list[int]:
        """Pids of the processes that wait, once there are `count`."""

        def found() -> list[int]:
            assert launched.process.poll() is None, f"it ended before the step:\n{launched.output()}"
            pids = sorted(int(path.name.partition("-")[2]) for path in self.gate.glob("held-*"))
            return pids if len(pids) == count else []

        return wait_for(found, "the step at which the test holds the run")

    def names(self) -> list[str]:
        """The checkpoints, oldest first."""
        found = [p for p in self.ckpt.iterdir() if p.name.startswith("checkpoint_")]
        return [p.name for p in sorted(found, key=lambda p: (p / "checkpoint.pth").stat().st_mtime_ns)]

    def payload(self, name: str = f"checkpoint_epoch_{EPOCHS}") -> dict[str, Any]:
        return torch.load(self.ckpt / name / "checkpoint.pth", weights_only=True)

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Those of the journal that count."""
        return [r for r in read_journal(self.run_dir / "journal.jsonl") if r["kind"] == kind]

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """All that were ever written, in their order."""
        every = [yaml.safe_load(line) for line in (self.run_dir / "journal.jsonl").read_text().splitlines()]
        return [r for r in every if r["kind"] == kind]


def keeper_of(run: Run) -> int:
    """The pid of its keeper."""
    [keeper] = keepers_of(run)
    return keeper


def keepers_of(run: Run) -> list[int]:
    return processes.keepers_of(str(run.run_dir))


def loader_workers_of(pid: int) -> list[int]:
    """Loader workers are children of the fork server, which is a child of `pid`."""
    return [grandchild for child in children_of(pid) for grandchild in children_of(child)]


def steps_begun(run: Run) -> list[int]:
    """The step of each pass of a virtual worker, in their order."""
    uses = run.gate / "uses.txt"
    return [int(line.split()[0]) for line in uses.read_text().splitlines()] if uses.exists() else []


def wait_for_steps(run: Run, count: int, launched: Launched, also: Callable[[], bool] = lambda: True) -> None:
    """Until that many more have begun than at any time before, and what else is asked for holds."""
    goal = max(steps_begun(run), default=-1) + count

    def reached() -> bool:
        assert launched.process.poll() is None, launched.output()
        return max(steps_begun(run), default=-1) >= goal and also()

    wait_for(reached, f"step {goal}; {launched.output()}")


def steps_repeated(run: Run, virtual_workers: int) -> int:
    """How many steps were begun again, all in all."""
    begun = steps_begun(run)
    return sum(-(-begun.count(step) // virtual_workers) - 1 for step in set(begun))


def assert_same_bits(found: Any, expected: Any, where: str = "checkpoint") -> None:
    """The two trees of dicts, lists, numbers and tensors are equal to the last bit."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), f"{where}: differs by up to {(found - expected).abs().max()}"
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_same_bits(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same_bits(*pair, f"{where}.{index}")
    else:
        assert found == expected, where


def assert_uses_once(run: Run, virtual_workers: int, epochs: int = EPOCHS, samples: int = SAMPLES) -> None:
    """By what the task wrote down: of each step the passes that count are the last ones."""
    passes: dict[int, list[tuple[int, list[int]]]] = {}
    for line in (run.gate / "uses.txt").read_text().splitlines():
        step, epoch, ids = line.split()
        passes.setdefault(int(step), []).append((int(epoch), [int(i) for i in ids.split(",")]))
    used: dict[int, list[int]] = {}
    for step in passes:
        for epoch, ids in passes[step][-virtual_workers:]:
            used.setdefault(epoch, []).extend(ids)
    assert {epoch: sorted(ids) for epoch, ids in used.items()} == {e: list(range(samples)) for e in range(epochs)}


def assert_each_sample_once(payload: dict[str, Any], virtual_workers: int) -> None:
    """By the ledger of a run under LEDGER: every epoch trained on every sample exactly once."""
    once = -LEDGER["OPTIMIZATION.LR"] / 8 / virtual_workers
    uses = payload["model_state"]["ledger"] / once
    assert torch.equal(uses, torch.ones(EPOCHS, SAMPLES)), f"uses by (epoch, sample): {uses.tolist()}"


def assert_curves_are_whole(run: Run, steps_per_epoch: int) -> None:
    """Journal and tensorboard have each step once and each evaluation once."""
    total = EPOCHS * steps_per_epoch
    steps = run.records("step")
    assert [r["step"] for r in steps] == list(range(1, total + 1))
    assert [r["epoch"] for r in steps] == [i // steps_per_epoch for i in range(total)]
    assert [r["epoch"] for r in run.records("eval")] == list(range(1, EPOCHS + 1))
    folder = run.run_dir / "tensorboard"
    assert curve(folder, "train/loss") == curve(folder, "meta_data/learning_rate") == list(range(1, total + 1))
    assert curve(folder / "eval", "eval/accuracy") == list(range(1, EPOCHS + 1))


def curve(folder: Path, tag: str) -> list[int]:
    """Where a curve has points, as tensorboard shows it."""
    return [event.step for event in events_of(folder, "scalars").Scalars(tag)]
