"""The checkpoints of a run: none is trusted unverified, none destroyed before its successor, ever."""

from __future__ import annotations

import multiprocessing
import os
import random
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import IMPORTED

from raytrain.errors import CheckpointError, StorageError, TaskError
from raytrain.progress import Progress
from raytrain.storage.arrow import ArrowStorage
from raytrain.storage.checkpoint import WORLD, Manifest
from raytrain.storage.local import LocalStorage
from raytrain.storage.paths import Bytes
from raytrain.storage.state_file import dumps, load_payload
from raytrain.storage.storage import Storage
from raytrain.storage.store import Store, checkpoint_name

STEPS_PER_EPOCH = 10
A_WORLD = dict.fromkeys(WORLD, 1)


def policy(**changes: Any) -> SimpleNamespace:
    periods = {"EVERY_EPOCHS": 1, "EVERY_STEPS": None}
    return SimpleNamespace(**{**periods, "KEEP_LAST": 5, "KEEP_BEST": 0, "METRIC": None, "MODE": "max", **changes})


def progress_at(step: int) -> Progress:
    epoch, rest = divmod(step, STEPS_PER_EPOCH)
    return Progress(epoch, rest * 8, step)


def save(store: Store, step: int, size: int = 8, **metrics: float) -> str:
    payload = {"epoch": 0, "it": step, "model_state": {"w": torch.full((size,), float(step))}, "optimizer_state": {}}
    return store.save(dumps(payload), Manifest(progress_at(step), {}, A_WORLD, 0, metrics), now=1_700_000_000.0).name


def names(store: Store) -> list[str]:
    return [entry.name for entry in store.listed()]


@pytest.fixture(params=["local", "arrow memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return LocalStorage(tmp_path)
    import pyarrow.fs

    return ArrowStorage(pyarrow.fs._MockFileSystem(), "bucket/run", "mock://bucket/run")


# When to save


def test_checkpoints_are_due_by_epoch_and_by_step(tmp_path: Path) -> None:
    store = Store(LocalStorage(tmp_path), policy(EVERY_EPOCHS=2, EVERY_STEPS=4), "a")
    due = [step for step in range(1, 13) if store.progress_due(progress_at(step), epoch_done=False)]
    assert due == [4, 8, 12]
    assert not store.progress_due(Progress(1, 0, 10), epoch_done=True)
    assert store.progress_due(Progress(2, 0, 30), epoch_done=True)


def test_null_switches_a_period_off(tmp_path: Path) -> None:
    store = Store(LocalStorage(tmp_path), policy(EVERY_EPOCHS=None), "a")
    assert not any(store.progress_due(progress_at(step), epoch_done=True) for step in range(50))


def test_names_tell_epochs_at_their_end_and_steps_within() -> None:
    assert checkpoint_name(Progress(3, 0, 1200)) == "checkpoint_epoch_3"
    assert checkpoint_name(Progress(3, 64, 1208)) == "checkpoint_step_1208"


# What a save leaves


def test_a_save_is_verified_and_says_who_made_it_when(storage: Storage) -> None:
    store = Store(storage, policy(), "launch-1")
    assert save(store, 12, accuracy=0.5) == "checkpoint_step_12"
    found, passed_over = store.latest_verified()
    assert found is not None and not passed_over
    assert found.path == storage.path_of("ckpt/checkpoint_step_12")
    assert found.manifest.launch == "launch-1"
    assert found.manifest.created == "2023-11-14T22:13:20+00:00"
    assert found.manifest.metrics == {"accuracy": 0.5}
    assert load_payload(storage, f"ckpt/{found.name}")["it"] == 12


def test_an_empty_run_folder_has_no_checkpoint(storage: Storage) -> None:
    store = Store(storage, policy(METRIC="accuracy"), "a")
    store.clean_leftovers()
    assert store.latest_verified() == (None, [])
    assert store.best() is None


def test_newest_is_by_progress_not_by_name_or_time(storage: Storage) -> None:
    store = Store(storage, policy(KEEP_LAST=9), "a")
    for step in (20, 7, 100, 33):
        save(store, step)
    expected = ["checkpoint_epoch_10", "checkpoint_step_33", "checkpoint_epoch_2", "checkpoint_step_7"]
    assert names(store) == expected


# Retention


def test_the_last_and_the_best_are_kept(storage: Storage) -> None:
    store = Store(storage, policy(KEEP_LAST=2, KEEP_BEST=2, METRIC="accuracy"), "a")
    for step, accuracy in ((10, 0.5), (20, 0.9), (30, float("nan")), (40, 0.7), (50, 0.6), (60, 0.1)):
        save(store, step, accuracy=accuracy)
    assert names(store) == [f"checkpoint_epoch_{n}" for n in (6, 5, 4, 2)]
    best = store.best()
    assert best is not None and best.name == "checkpoint_epoch_2"


@pytest.mark.parametrize(
    ("chosen", "kept"),
    [
        ({"KEEP_LAST": 5}, ["step_43", "step_41", "epoch_4", "epoch_3", "epoch_2"]),
        (
            {"KEEP_LAST": 5, "EVERY_EPOCHS": None, "EVERY_STEPS": 20},
            ["step_43", "step_41", "epoch_4", "step_36", "epoch_2"],
        ),
        ({"KEEP_LAST": 4, "EVERY_EPOCHS": None}, ["step_43", "step_41", "epoch_4", "step_36"]),
        ({"KEEP_LAST": 2}, ["step_43", "step_41"]),
        ({"KEEP_LAST": 1}, ["step_43"]),
    ],
)
def test_what_was_saved_as_time_had_passed_pushes_out_no_epoch(
    tmp_path: Path, chosen: dict[str, Any], kept: list[str]
) -> None:
    store = Store(LocalStorage(tmp_path), policy(**chosen), "a")
    for step in (7, 10, 13, 17, 20, 24, 27, 30, 36, 40, 41, 43):
        save(store, step)
    assert names(store) == [f"checkpoint_{name}" for name in kept]


def test_the_smallest_is_best_if_mode_is_min_and_the_first_of_equals_wins(tmp_path: Path) -> None:
    store = Store(LocalStorage(tmp_path), policy(KEEP_LAST=1, KEEP_BEST=1, METRIC="loss", MODE="min"), "a")
    for step, loss in ((10, 0.5), (20, 0.25), (30, 0.25), (40, 0.7)):
        save(store, step, loss=loss)
    best = store.best()
    assert best is not None and best.name == "checkpoint_epoch_2"
    assert names(store) == ["checkpoint_epoch_4", "checkpoint_epoch_2"]


def test_the_best_is_the_best_that_verifies(tmp_path: Path) -> None:
    store = Store(LocalStorage(tmp_path), policy(METRIC="accuracy"), "a")
    for step, accuracy in ((10, 0.5), (20, 0.9), (30, 0.7)):
        save(store, step, accuracy=accuracy)
    flip(tmp_path / "ckpt/checkpoint_epoch_2/checkpoint.pth")
    best = store.best()
    assert best is not None and best.name == "checkpoint_epoch_3"


def test_a_checkpoint_saved_just_now_is_kept_even_if_others_are_further(tmp_path: Path) -> None:
    store = Store(LocalStorage(tmp_path), policy(KEEP_LAST=1), "a")
    save(store, 50)
    save(store, 10)
    assert names(store) == ["checkpoint_epoch_5", "checkpoint_epoch_1"]


def test_damaged_checkpoints_do_not_count_as_kept_ones(tmp_path: Path) -> None:
    store = Store(LocalStorage(tmp_path), policy(KEEP_LAST=9), "a")
    for step in (10, 20, 30, 40, 50):
        save(store, step)
    (tmp_path / "ckpt/checkpoint_epoch_5/manifest.json").unlink()
    (tmp_path / "ckpt/checkpoint_epoch_3/checkpoint.pth").unlink()
    (tmp_path / "ckpt/checkpoint_epoch_1/manifest.json").write_text("{")
    store.policy.KEEP_LAST = 3
    save(store, 60)
    # 6, 4 and 2 are whole and kept; 5 and 3 are damaged and not older than those; 1 is both.
    assert names(store) == [f"checkpoint_epoch_{n}" for n in (6, 5, 4, 3, 2)]


def test_retention_never_leaves_less_than_one_verified_checkpoint(tmp_path: Path) -> None:
    chosen = random.Random(0)
    every = {step: tmp_path / str(step) / "ckpt" for step in range(1, 60)}
    saved = {step: save(Store(LocalStorage(ckpt.parent), policy(), "a"), step) for step, ckpt in every.items()}
    store = Store(LocalStorage(tmp_path), policy(), "a")
    for _ in range(60):
        shutil.rmtree(tmp_path / "ckpt", ignore_errors=True)
        for step in chosen.sample(range(1, 60), 5):
            shutil.copytree(every[step] / saved[step], tmp_path / "ckpt" / saved[step])
        for name in chosen.sample(names(store), chosen.randint(0, 4)):
            file = tmp_path / "ckpt" / name / chosen.choice(["checkpoint.pth", "manifest.json"])
            chosen.choice([flip, Path.unlink, lambda path: path.write_bytes(b"")])(file)
        before, _ = store.latest_verified()
        store.policy.KEEP_LAST = chosen.randint(1, 3)
        just_saved = store.verified(save(store, chosen.randrange(1, 60)))
        newest, _ = store.latest_verified()
        assert newest is not None and before is not None
        assert just_saved.name in names(store)
        assert newest.manifest.progress.step >= just_saved.manifest.progress.step


def test_metrics_of_a_later_evaluation_join_the_checkpoint_and_decide_what_is_kept(storage: Storage) -> None:
    store = Store(storage, policy(KEEP_LAST=1, KEEP_BEST=1, METRIC="accuracy"), "a")
    for step, accuracy in ((10, 0.5), (20, 0.9), (30, 0.7)):
        payload = {"model_state": {"w": torch.ones(2)}}
        name = store.save(dumps(payload), Manifest(progress_at(step), {}, A_WORLD, 0), now=0.0).name
        assert store.verified(name).manifest.metrics is None
        store.add_metrics(name, {"accuracy": accuracy})
        assert store.verified(name).manifest.metrics == {"accuracy": accuracy}
    assert names(store) == ["checkpoint_epoch_3", "checkpoint_epoch_2"]
    best = store.best()
    assert best is not None and best.name == "checkpoint_epoch_2"


def test_better_is_by_metric_and_mode_and_nan_is_never_better(tmp_path: Path) -> None:
    store = Store(LocalStorage(tmp_path), policy(METRIC="loss", MODE="min"), "a")
    best = {"metrics": {"loss": 0.5}}
    assert store.is_better({"loss": 9.0}, None)
    assert store.is_better({"loss": 0.4}, best)
    assert not store.is_better({"loss": 0.5}, best)
    assert not store.is_better({"loss": float("nan")}, None)
    with pytest.raises(
        TaskError, match=r"CHECKPOINT.METRIC is 'loss', which the evaluation does not give; it gives acc"
    ):
        store.is_better({"acc": 1.0}, best)
    store.policy.METRIC = None
    assert not store.is_better({"loss": 0.1}, None)


# Damage


@pytest.mark.parametrize("file", ["checkpoint.pth", "manifest.json"])
@pytest.mark.parametrize("damage", ["torn", "emptied", "flipped", "missing"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_named(
    tmp_path: Path, file: str, damage: str
) -> None:
    store = Store(LocalStorage(tmp_path), policy(), "a")
    for step in (10, 20, 25):
        save(store, step)
    path = tmp_path / "ckpt/checkpoint_step_25" / file
    match damage:
        case "torn":
            path.write_bytes(path.read_bytes()[:-10])
        case "emptied":
            path.write_bytes(b"")
        case "flipped":
            flip(path)
        case "missing":
            path.unlink()
    found, passed_over = store.latest_verified()
    assert found is not None and found.name == "checkpoint_epoch_2"
    [(name, reason)] = passed_over
    assert name == "checkpoint_step_25"
    assert str(tmp_path / "ckpt/checkpoint_step_25") in reason and file in reason


def test_each_damaged_checkpoint_is_named_newest_first(tmp_path: Path) -> None:
    store = Store(LocalStorage(tmp_path), policy(), "a")
    for step in (10, 20, 25, 30):
        save(store, step)
    flip(tmp_path / "ckpt/checkpoint_epoch_3/checkpoint.pth")
    (tmp_path / "ckpt/checkpoint_step_25/manifest.json").unlink()
    (tmp_path / "ckpt/checkpoint_epoch_2/manifest.json").unlink()
    found, passed_over = store.latest_verified()
    assert found is not None and found.name == "checkpoint_epoch_1"
    assert [name for name, _ in passed_over] == ["checkpoint_epoch_3", "checkpoint_step_25", "checkpoint_epoch_2"]


def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_by_again(storage: Storage) -> None:
    store = Store(storage, policy(), "a")
    save(store, 10)
    save(store, 20)
    storage.write_bytes("ckpt/checkpoint_epoch_2/manifest.json", b"{")
    save(store, 20)
    assert store.verified("checkpoint_epoch_2").manifest.progress.step == 20
    assert storage.list("ckpt") == ["checkpoint_epoch_1", "checkpoint_epoch_2"]


def test_a_folder_that_cannot_be_read_is_an_error_not_an_empty_run(tmp_path: Path) -> None:
    (tmp_path / "ckpt").write_text("a file")
    with pytest.raises(StorageError, match="ckpt: cannot list: Not a directory"):
        Store(LocalStorage(tmp_path), policy(), "a").latest_verified()


# Going back


def test_going_back_moves_newer_checkpoints_aside(storage: Storage) -> None:
    store = Store(storage, policy(KEEP_LAST=1), "later")
    for step in (10, 20, 25, 30):
        Store(storage, policy(), "first").save(
            dumps({"model_state": {"w": torch.ones(2)}}),
            Manifest(progress_at(step), {}, A_WORLD, 0),
            now=0.0,
        )
    assert store.supersede(progress_at(20)) == ["checkpoint_epoch_3", "checkpoint_step_25"]
    assert names(store) == ["checkpoint_epoch_2", "checkpoint_epoch_1"]
    assert storage.list("ckpt/superseded/later") == ["checkpoint_epoch_3", "checkpoint_step_25"]
    save(store, 25)
    assert names(store) == ["checkpoint_step_25"]
    assert store.supersede(progress_at(20)) == ["checkpoint_step_25"]
    moved = ["checkpoint_epoch_3", "checkpoint_step_25", "checkpoint_step_25-2"]
    assert storage.list("ckpt/superseded/later") == moved


# Dying in mid-save


class Death(BaseException):
    """The process ends here: nothing that changes a file works any more."""


class Fuse:
    """Before the n-th file operation of this process (and each after it) comes Death, if `left` says n."""

    left: float = float("inf")

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.left == float("inf"):
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            self.left -= 1
            if self.left < 0:
                raise Death


@pytest.fixture(scope="module")
def watched_fuse() -> Fuse:
    fuse = Fuse()
    sys.addaudithook(fuse.watch)  # for the life of the process; without a number it lets everything pass
    return fuse


@pytest.fixture
def fuse(watched_fuse: Fuse) -> Iterator[Fuse]:
    yield watched_fuse
    watched_fuse.left = float("inf")


@pytest.mark.parametrize("case", ["a new name", "the same name", "over a damaged one"])
def test_death_between_any_two_file_operations_of_a_save_loses_nothing(tmp_path: Path, fuse: Fuse, case: str) -> None:
    survived = 0
    for operations in range(100):
        folder = tmp_path / str(operations)
        store = Store(LocalStorage(folder), policy(KEEP_LAST=1), "a")
        save(store, 10)
        if case == "over a damaged one":
            save(store, 20)
            store.policy.KEEP_LAST = 2
            save(store, 10)
            flip(folder / "ckpt/checkpoint_epoch_2/checkpoint.pth")
            store.policy.KEEP_LAST = 1
        before = store.latest_verified()[0]
        step = 10 if case == "the same name" else 20
        fuse.left = operations
        try:
            save(store, step, marker=1.0)
        except Death:
            survived += 1
            died = True
        else:
            died = False
        finally:
            fuse.left = float("inf")
        again = Store(LocalStorage(folder), policy(KEEP_LAST=1), "b")
        again.clean_leftovers()
        found, passed_over = again.latest_verified()
        assert before is not None and found is not None
        assert found == before or found.manifest.progress.step == step
        assert not passed_over or case == "over a damaged one"
        assert not list((folder / "ckpt").glob(".*"))
        if not died:
            assert found.manifest.metrics == {"marker": 1.0}
            break
    assert survived >= 5 and not died


def test_a_launch_that_was_killed_as_it_tried_the_folder_does_not_keep_the_next_one_out(tmp_path: Path) -> None:
    left = tmp_path / "ckpt" / f".writing-.writable-{os.getpid()}.1-0123abcd"
    left.parent.mkdir()
    left.write_bytes(b"")
    Store(LocalStorage(tmp_path), policy(), "a").clean_leftovers()
    assert not left.exists()


def test_a_leftover_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("this system does not tell when a process began")
    start = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    living = tmp_path / f"ckpt/.writing-checkpoint_epoch_1-{os.getppid()}.{start}-00000000"
    dead = tmp_path / "ckpt/.writing-checkpoint_epoch_1-4194305.1-00000000"
    for folder in (living, dead):
        folder.mkdir(parents=True)
    (tmp_path / ".writing-config.yaml-4194305.1-00000000").write_text("half")
    Store(LocalStorage(tmp_path), policy(), "a").clean_leftovers()
    assert living.exists() and not dead.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_a_writer_killed_again_and_again_never_loses_what_it_had_saved(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")  # of one thread, so that it may fork
    context.set_forkserver_preload(IMPORTED)
    here, there = context.Pipe(duplex=False)
    killer = context.Process(target=kill_writers, args=(tmp_path, 20, there))
    killer.start()
    there.close()
    try:
        assert here.recv().startswith("20 kills")
    except EOFError:
        pytest.fail("it says above what was lost")
    finally:
        killer.join(120)


def test_a_checkpoint_that_does_not_read_back_is_an_error_and_nothing_is_removed(tmp_path: Path) -> None:
    class LyingDisk(LocalStorage):
        """Says that all is written, and flips a bit."""

        lies = False

        def write_bytes(self, name: str, data: Bytes) -> None:
            super().write_bytes(name, data)
            if self.lies and name.endswith(".pth"):
                flip(self.local_path(name))

    disk = LyingDisk(tmp_path)
    store = Store(disk, policy(KEEP_LAST=1), "a")
    save(store, 10)
    disk.lies = True
    with pytest.raises(CheckpointError, match=r"checkpoint_epoch_2.*read back is not what was written"):
        save(store, 20)
    found, _ = store.latest_verified()
    assert found is not None and found.name == "checkpoint_epoch_1"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def save_until_killed(folder: Path, acknowledge: int) -> None:
    """Steps on from the newest checkpoint for ever, each saved twice; each finished save is told by its number."""
    store = Store(LocalStorage(folder), policy(KEEP_LAST=2), "a")
    store.clean_leftovers()
    found, passed_over = store.latest_verified()
    assert not passed_over, passed_over
    step = found.manifest.progress.step if found else 0
    while True:
        step += 1
        for _ in range(2):
            save(store, step, size=200_000)
            os.write(acknowledge, step.to_bytes(8, "little"))


def kill_writers(folder: Path, kills: int, told: Connection) -> None:
    """Forks writers and kills them; in a process of one thread."""
    torch.set_num_threads(1)
    chosen = random.Random(0)
    saved = in_mid_save = 0
    for kill in range(kills):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            save_until_killed(folder, writer)
        os.close(writer)
        if kill % 2:  # once it has saved, however busy the machine is; else also before
            select.select([reader], [], [], 60)
        time.sleep(chosen.uniform(0.02, 0.15))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, f"the writer ended by itself: {status}"
        with os.fdopen(reader, "rb") as acknowledged:
            numbers = acknowledged.read()
        if numbers:
            saved = int.from_bytes(numbers[-8:], "little")
        in_mid_save += any((folder / "ckpt").glob(".*"))
        store = Store(LocalStorage(folder), policy(KEEP_LAST=2), "b")
        store.clean_leftovers()
        found, passed_over = store.latest_verified()
        assert not passed_over, passed_over
        assert found is not None or saved == 0
        assert found is None or found.manifest.progress.step >= saved
        weights = load_payload(store.storage, f"ckpt/{found.name}")["model_state"]["w"] if found else None
        assert found is None or weights is None or float(weights[0]) == found.manifest.progress.step
    assert saved and in_mid_save
    told.send(f"{kills} kills, {in_mid_save} of them in mid-save, {saved} steps saved")
