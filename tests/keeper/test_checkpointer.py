"""A run's states on their way to memory and storage: how often, in what order, and what goes wrong behind its back."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import wait_for
from optimization import settings
from processes import Pair, keepers_of
from small_runs import config

from raytrain.engine.state import RunState, build_run, payload_of
from raytrain.engine.world import World
from raytrain.errors import PreflightError, StorageError
from raytrain.journal.run_folder import RunFolder
from raytrain.keeper import channel, client, shared_memory
from raytrain.keeper.checkpointer import LEAST_S, Checkpointer
from raytrain.keeper.client import KeeperClient
from raytrain.keeper.snapshots import Pace, Snapshots, load_newest
from raytrain.progress import Progress
from raytrain.storage.state_file import loads
from raytrain.storage.store import Store
from raytrain.task import make_task
from raytrain.training.preflight import driver
from raytrain.training.resume import bring_from_memory
from raytrain.training.worker import build_datasets, plan_of

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


class Scene:
    """A run that stands at a step of its first epoch, its keeper, and its saves."""

    def __init__(self, folder: Path, launch: str = "20260101-a", device: str = "cpu", **policy: Any) -> None:
        chosen = {"EVERY_SECONDS": None, "SNAPSHOT_EVERY": 1, "KEEP_LAST": 9, **policy}
        cfg = config(folder, "PointsTask", {}, CHECKPOINT=chosen)
        task, world = make_task(cfg), World(device=torch.device(device))
        datasets = build_datasets(task, cfg.SEED)
        self.run: RunState = build_run(cfg, task, datasets["train"], plan_of(cfg, len(datasets["train"]), world), world)
        self.uri = str(folder / "run")
        self.store = Store(RunFolder(self.uri).storage, cfg.CHECKPOINT, launch)
        self.store.storage.write_bytes("journal.jsonl", b"")  # what a run begins with
        self.kept = KeeperClient(self.uri, launch)
        self.saves = Checkpointer(self.store, self.kept)
        self.saves.describe(self.run, driver())

    def stand_at(self, step: int) -> None:
        self.run.progress = Progress(0, step, step)
        with torch.no_grad():
            for param in self.run.model.parameters():
                param.fill_(float(step))

    def save(self, step: int, **options: Any) -> Any:
        self.stand_at(step)
        return self.saves.save(self.run, {}, time.time(), **options)

    @property
    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.store.listed())

    @property
    def keeper(self) -> int:
        [found] = keepers_of(self.uri)
        return found


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.kept.end()
    made.kept.close()


def weights(payload: dict[str, Any]) -> set[float]:
    state = {name: tensor for name, tensor in payload["model_state"].items() if name.endswith(("weight", "bias"))}
    return {float(value) for tensor in state.values() for value in tensor.flatten()}


def test_a_saved_state_is_on_the_storage_bit_for_bit_while_the_run_has_gone_on(scene: Scene) -> None:
    os.kill(scene.keeper, signal.SIGSTOP)
    save = scene.save(3)
    scene.stand_at(4)
    assert scene.names == [] and not scene.saves.finished()
    os.kill(scene.keeper, signal.SIGCONT)
    scene.saves.settle()
    assert scene.names == ["checkpoint_step_3"] == [done.name for done in scene.saves.finished()] == [save.wait()]
    saved = torch.load(Path(scene.uri) / "ckpt/checkpoint_step_3/checkpoint.pth", weights_only=True)
    assert weights(saved) == {3.0} and saved["it"] == 3
    assert save.weights == scene.store.verified("checkpoint_step_3").manifest.weights != ""


@pytest.mark.parametrize("device", DEVICES)
def test_the_newest_state_in_memory_is_that_of_the_last_step(tmp_path: Path, device: str) -> None:
    scene = Scene(tmp_path, device=device)
    for step in range(1, 6):
        scene.stand_at(step)
        assert scene.saves.after_step(scene.run)
    if device == "cuda":
        torch.cuda.synchronize()
        scene.stand_at(99)
        scene.saves.after_step(scene.run)  # what has arrived counts from now on
    assert scene.kept.newest == Progress(0, 5, 5)
    again = KeeperClient(scene.uri, scene.store.launch, leads=False, keeps=False)  # as a worker that was started again
    assert weights(load_newest(again)) == {5.0}
    assert scene.names == []
    again.close()
    scene.kept.end()


def test_a_state_with_nan_in_it_never_takes_the_place_of_a_good_one(scene: Scene) -> None:
    scene.stand_at(1)
    scene.saves.after_step(scene.run)
    scene.stand_at(2)
    next(scene.run.model.parameters()).data[0] = torch.nan
    scene.saves.after_step(scene.run)
    assert scene.kept.newest == Progress(0, 1, 1)


def test_an_epochs_end_is_kept_by_its_save_alone(scene: Scene) -> None:
    scene.run.progress = Progress(1, 0, 12)
    assert not scene.saves.after_step(scene.run)


def test_a_save_that_waits_gives_way_to_a_newer_one_and_one_that_must_not_does_not(scene: Scene) -> None:
    os.kill(scene.keeper, signal.SIGSTOP)
    saves = [scene.save(step, may_be_replaced=True) for step in (1, 2)]
    os.kill(scene.keeper, signal.SIGCONT)
    scene.saves.settle()
    os.kill(scene.keeper, signal.SIGSTOP)
    saves += [scene.save(step) for step in (3, 4)]
    os.kill(scene.keeper, signal.SIGCONT)
    saves += [scene.save(5), scene.save(6, may_be_replaced=True), scene.save(7)]
    scene.saves.settle()
    assert {"checkpoint_step_2", "checkpoint_step_7"} <= set(scene.names)
    assert {f"checkpoint_step_{step}" for step in (3, 4, 5)} <= set(scene.names)
    assert [save.wait() for save in saves] == [s.name if s.name in scene.names else None for s in saves]


def test_memory_is_bounded_by_four_states(scene: Scene) -> None:
    os.kill(scene.keeper, signal.SIGSTOP)
    scene.save(1), scene.save(2)
    for step in range(3, 9):
        scene.stand_at(step)
        scene.saves.after_step(scene.run)
    assert scene.kept.newest is not None and scene.kept.newest.step >= 7
    assert scene.kept.slots is not None
    assert len(scene.kept.slots.memory) == shared_memory.SLOTS * scene.kept.slots.slot_bytes
    os.kill(scene.keeper, signal.SIGCONT)
    scene.saves.settle()


def test_metrics_come_to_the_checkpoint_that_is_still_on_its_way(scene: Scene) -> None:
    save = scene.save(3)
    scene.saves.add_metrics(save.name, {"accuracy": 0.5, "loss": float("nan")})
    scene.saves.settle()
    assert scene.store.verified(save.name).manifest.metrics == {"accuracy": 0.5, "loss": None}


def test_what_fails_behind_the_loop_is_raised_at_the_next_step_with_its_cause(scene: Scene) -> None:
    scene.stand_at(1)
    scene.saves.after_step(scene.run)
    _, hard = resource.prlimit(scene.keeper, resource.RLIMIT_FSIZE)
    resource.prlimit(scene.keeper, resource.RLIMIT_FSIZE, (1000, hard))
    scene.save(2)
    deadline = time.monotonic() + 20
    with pytest.raises(StorageError, match=r"checkpoint of step 2 could not be saved: .*File too large. Free some"):
        while time.monotonic() < deadline:
            scene.stand_at(3)
            scene.saves.after_step(scene.run)
    assert scene.names == []
    resource.prlimit(scene.keeper, resource.RLIMIT_FSIZE, (hard, hard))
    scene.save(4)
    scene.saves.settle()
    assert scene.names == ["checkpoint_step_4"]


def test_a_checkpoint_folder_that_goes_under_a_running_job_is_made_again(scene: Scene) -> None:
    scene.save(1)
    scene.saves.settle()
    shutil.rmtree(Path(scene.uri) / "ckpt")
    scene.save(2)
    scene.saves.settle()
    assert scene.names == ["checkpoint_step_2"]


def test_what_a_keeper_that_died_had_to_write_is_written_and_another_keeps(scene: Scene) -> None:
    os.kill(scene.keeper, signal.SIGSTOP)
    save = scene.save(1)
    scene.saves.add_metrics(save.name, {"accuracy": 0.5})
    os.kill(scene.keeper, signal.SIGKILL)
    scene.saves.settle()
    manifest = scene.store.verified("checkpoint_step_1").manifest
    assert manifest.metrics == {"accuracy": 0.5} and manifest.weights == save.weights != ""
    scene.save(2)
    scene.saves.settle()
    scene.stand_at(3)
    scene.saves.after_step(scene.run)
    assert scene.kept.newest == Progress(0, 3, 3) and scene.names == ["checkpoint_step_1", "checkpoint_step_2"]


def test_the_state_that_a_dead_launch_had_in_memory_is_saved_before_another_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Scene(tmp_path)
    first.stand_at(5)
    first.saves.after_step(first.run)
    with (
        monkeypatch.context() as patched,
        pytest.raises(PreflightError, match="another run is training in this folder"),
    ):
        patched.setattr("raytrain.keeper.client.TAKE_OVER_S", 0.3)
        KeeperClient(first.uri, "20260102-b")
    first.kept.close()
    second = KeeperClient(first.uri, "20260102-b")
    assert second.newest is None and first.names == ["checkpoint_step_5"]
    second.end()


def test_a_keeper_that_is_stopped_is_named_instead_of_waited_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "ANSWER_S", 0.1)
    os.kill(scene.keeper, signal.SIGSTOP)
    for ask in (lambda: client.take_over(scene.uri, 0.0), lambda: KeeperClient(scene.uri, "20260102-b")):
        with pytest.raises(PreflightError, match=rf"{scene.keeper}, .* is stopped .* `kill -CONT {scene.keeper}`"):
            ask()
    os.kill(scene.keeper, signal.SIGCONT)


def test_a_state_that_grows_moves_to_larger_memory(scene: Scene) -> None:
    scene.stand_at(1)
    scene.saves.after_step(scene.run)
    scene.run.model.register_buffer("cache", torch.full((100_000,), 2.0))
    scene.stand_at(2)
    scene.saves.after_step(scene.run)
    kept = loads(scene.kept.state(scene.kept.status.newest() or 0), "memory")
    assert kept["it"] == 2 and torch.equal(kept["model_state"]["cache"], payload_of(scene.run)["model_state"]["cache"])


def test_the_newest_state_moves_along_to_larger_memory(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.stand_at(1)
    scene.saves.after_step(scene.run)
    Snapshots(scene.kept).make_room(10_000_000)
    assert scene.kept.newest == Progress(0, 1, 1) and weights(load_newest(scene.kept)) == {1.0}
    scene.kept.close()  # as the kernel does for a process that is killed
    KeeperClient(scene.uri, "20260102-b").end()
    assert scene.names == ["checkpoint_step_1"]


def test_memory_for_all_that_a_run_will_keep_is_fetched_before_its_first_step(scene: Scene) -> None:
    scene.saves.prepare(scene.run)
    slots = scene.kept.slots
    assert slots is not None
    deadline = time.monotonic() + 20
    while os.fstat(slots.descriptor).st_blocks * 512 < 3 * slots.slot_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    engine = scene.run.engine
    engine.zero_grad()
    engine.backward(torch.stack([param.square().sum() for param in scene.run.model.parameters()]).sum(), 1.0)
    engine.step(settings(0.1, 0.9), ())
    scene.run.progress = Progress(0, 1, 1)
    assert scene.saves.after_step(scene.run) and scene.kept.slots is slots
    assert loads(scene.kept.state(0), "memory")["optimizer_state"]["state"]


def test_a_state_copied_while_its_memory_is_being_fetched_is_whole(scene: Scene) -> None:
    scene.run.model.register_buffer("cache", torch.arange(20_000_000, dtype=torch.float32))
    scene.saves.prepare(scene.run)
    for step in range(1, 5):
        scene.stand_at(step)
        scene.saves.after_step(scene.run)
        state = load_newest(scene.kept)["model_state"]
        assert torch.equal(state["cache"], scene.run.model.cache)  # type: ignore[arg-type]


def test_memory_that_was_too_small_is_given_back_by_worker_and_keeper(scene: Scene) -> None:
    for step in range(1, 5):
        scene.run.model.register_buffer("cache", torch.zeros(step * 100_000))
        scene.save(step)
        scene.saves.settle()
    for pid in (os.getpid(), scene.keeper):
        links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
        assert sum("raytrain-slots" in link for link in links) <= 2  # the module's, and the mapping's


def test_states_are_kept_so_often_that_it_takes_its_share_of_the_time_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("raytrain.keeper.snapshots.time.perf_counter", lambda: now)

    def kept(step_s: float, cost_s: float, every: Any, steps: int = 2000) -> int:
        nonlocal now
        pace, count = Pace(0.01), 0
        for _ in range(steps):
            now += step_s
            if pace.is_due(every):
                count += 1
                now += cost_s
                pace.took(cost_s, first=False)
        return count

    assert kept(0.1, 0.0005, "auto") == 2000
    assert 180 <= kept(0.1, 0.01, "auto") <= 210  # 1 % of ten steps
    assert kept(0.1, 0.01, 1) == 2000
    assert kept(0.1, 0.01, 50) == 40
    assert kept(0.1, 0.01, None) == 0


def test_a_copy_that_was_held_up_once_does_not_put_the_next_ones_off(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("raytrain.keeper.snapshots.time.perf_counter", lambda: now)
    for held_up in (1, 10):
        pace, kept_at = Pace(0.01), []
        for step in range(1, 31):
            now += 0.02
            if pace.is_due("auto"):
                kept_at.append(step)
                pace.took(0.05 if len(kept_at) == held_up else 0.0003, first=False)
        assert max(after - before for before, after in itertools.pairwise(kept_at)) <= 2


def test_the_interval_between_saves_follows_what_they_cost(scene: Scene) -> None:
    policy = scene.store.policy.model_copy(update={"EVERY_SECONDS": "auto"})
    saves = Checkpointer(Store(scene.store.storage, policy, "b"), None)
    assert not saves.time_due(0.0) and saves.time_due(LEAST_S)
    scene.stand_at(1)
    save = saves.save(scene.run, {}, 1000.0)
    save.stall_s = 3.0
    saves._record(save, 5.0, 0.0)
    assert not saves.time_due(1000.0 + 299.0) and saves.time_due(1000.0 + 301.0)  # 3 s are 1 % of 300


def brought(rank: int, folder: Path) -> tuple[set[float], Progress, bool]:
    """What a rank stands at once the state in memory of rank 1's host has come to all."""
    world = World.joined(2, torch.device("cpu"))
    scene = Scene(folder / str(rank), launch=f"20260101-{rank}")
    scene.run.world = world
    if rank == 1:
        scene.stand_at(5)
        scene.saves.after_step(scene.run)
        scene.stand_at(0)
    origin = bring_from_memory(scene.run, scene.kept if rank == 1 else None, None)
    scene.kept.end()
    return weights({"model_state": scene.run.model.state_dict()}), scene.run.progress, bool(origin and origin.is_memory)


def test_a_state_that_only_one_host_has_comes_to_the_others(pair: Pair, tmp_path: Path) -> None:
    assert pair.run(brought, tmp_path) == [({5.0}, Progress(0, 5, 5), True)] * 2


def test_what_a_dead_worker_wanted_written_is_not_filled_again_by_the_next_one(scene: Scene) -> None:
    keeper = scene.keeper
    os.kill(keeper, signal.SIGSTOP)
    scene.save(2)
    scene.save(3)
    scene.kept.close()  # as the kernel does for a process that is killed
    threading.Timer(0.2, os.kill, (keeper, signal.SIGCONT)).start()
    scene.kept = KeeperClient(scene.uri, scene.store.launch)
    scene.saves = Checkpointer(scene.store, scene.kept)
    scene.saves.describe(scene.run, driver())
    for step in range(4, 9):
        scene.stand_at(step)
        scene.saves.after_step(scene.run)
    scene.save(9)
    scene.saves.settle()
    assert scene.names == ["checkpoint_step_2", "checkpoint_step_3", "checkpoint_step_9"]
    for name in scene.names:
        saved = torch.load(Path(scene.uri) / "ckpt" / name / "checkpoint.pth", weights_only=True)
        step = scene.store.verified(name).manifest.progress.step
        assert weights(saved) == {float(step)} and saved["it"] == step


def test_several_saves_that_fail_at_once_end_the_wait_for_them(scene: Scene) -> None:
    keeper = scene.keeper
    os.kill(keeper, signal.SIGSTOP)
    resource.prlimit(keeper, resource.RLIMIT_FSIZE, (100, 100))
    scene.save(2)
    scene.saves.add_metrics("checkpoint_step_2", {"accuracy": 0.5})
    os.kill(keeper, signal.SIGCONT)
    deadline, before = time.monotonic() + 20, scene.saves._answers
    while scene.kept.status.answers < before + 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(StorageError, match="the checkpoint of step 2 could not be saved"):
        scene.saves.settle()
    scene.saves.settle()  # as the loop does on its way out: for good once, since the second answer was lost


def test_the_end_of_an_epoch_that_nobody_saves_stands_in_memory(scene: Scene) -> None:
    scene.run.progress = Progress(1, 0, 7)
    assert not scene.saves.after_step(scene.run)  # the loop does not know yet whether it is saved
    assert scene.saves.after_epoch(scene.run)
    assert client.newest_progress(scene.uri) == Progress(1, 0, 7)


def test_a_keeper_that_dies_has_a_successor_within_a_second(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.stand_at(1)
    assert scene.saves.after_step(scene.run)
    first = scene.keeper
    monkeypatch.setattr("raytrain.keeper.checkpointer.HEAR_S", 0.0)
    os.kill(first, signal.SIGKILL)
    scene.stand_at(2)
    wait_for(lambda: scene.saves.after_step(scene.run) and keepers_of(scene.uri) not in ([], [first]), "another one")
    assert client.newest_progress(scene.uri) == Progress(0, 2, 2)


def test_a_clock_that_is_set_back_holds_up_no_save(tmp_path: Path) -> None:
    saves = Checkpointer(
        Store(RunFolder(str(tmp_path)).storage, config(tmp_path, "PointsTask", {}).CHECKPOINT, "a"), None
    )
    saves.policy = saves.policy.model_copy(update={"EVERY_SECONDS": 10.0})
    assert [saves.time_due(now) for now in (5000.0, 1400.0, 1405.0, 1410.0)] == [False, False, False, True]
