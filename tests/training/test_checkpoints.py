"""`raytrain checkpoints`: what lies in a run folder, whether it is sound, and what a resume would take."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3_server
import torch

from raytrain.cli import main
from raytrain.config.sections import Checkpoint
from raytrain.errors import CheckpointError
from raytrain.progress import Progress
from raytrain.storage.checkpoint import WORLD, Manifest
from raytrain.storage.local import LocalStorage
from raytrain.storage.state_file import dumps
from raytrain.storage.storage import Storage, open_storage
from raytrain.storage.store import Store
from raytrain.training.checkpoints import Survey, age, size, survey
from raytrain.training.resume import choose

CONFIG = {"CHECKPOINT": {"METRIC": "accuracy", "KEEP_BEST": 1}, "OPTIMIZATION": {"NUM_EPOCHS": 50}}
NOW = 1_800_000_000.0
DEAD = ".writing-{}-999999999.1-0123abcd"  # a process of that number there is not


@pytest.fixture(params=["disk", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "disk":
        yield LocalStorage(tmp_path)
        return
    with s3_server.serving() as server:
        yield open_storage(server.uri("bucket/output/run"))


def save(storage: Storage, epoch: int, cursor: int = 0, launch: str = "first", **metrics: float) -> str:
    """A checkpoint of a data set of 1,438 samples in steps of 64, as a run saves it."""
    progress = Progress(epoch, cursor, epoch * 23 + cursor // 64)
    manifest = Manifest(progress, CONFIG, {**dict.fromkeys(WORLD, 1), "num_samples": 1438}, 0, metrics or None)
    payload = {"epoch": epoch, "it": progress.step, "model_state": {"w": torch.ones(8)}, "optimizer_state": {}}
    return Store(storage, Checkpoint(KEEP_LAST=9), launch).save(dumps(payload), manifest, NOW).name


def damage(storage: Storage, name: str) -> None:
    """One bit of its payload is another."""
    path = f"ckpt/{name}/checkpoint.pth"
    data = bytearray(storage.read_bytes(path))
    data[len(data) // 2] ^= 1
    storage.write_bytes(path, bytes(data))


def marks(found: Survey) -> dict[str, str]:
    return {row.name: ", ".join(row.marks) for row in found.rows}


def states(found: Survey) -> list[str]:
    return [row.state for row in found.rows]


def test_the_newest_the_best_and_the_one_that_resume_takes_are_told(storage: Storage) -> None:
    save(storage, 1, accuracy=0.9)
    save(storage, 2, accuracy=0.8)
    save(storage, 2, cursor=128)
    found = survey(storage)
    assert marks(found) == {
        "checkpoint_step_48": "newest, resume takes this",
        "checkpoint_epoch_2": "",
        "checkpoint_epoch_1": "best",
    }
    assert states(found) == ["ok", "not checked", "not checked"]
    assert found.says == [
        "resume goes on from checkpoint_step_48 (epoch 3, 128 of 1,438 samples), the newest that is whole"
    ]


def test_what_is_passed_over_is_told_with_the_reason(storage: Storage) -> None:
    for epoch in (1, 2, 3):
        save(storage, epoch, accuracy=0.9)
    damage(storage, "checkpoint_epoch_3")
    storage.remove_tree("ckpt/checkpoint_epoch_2/manifest.json")
    found = survey(storage)
    assert found.usable
    assert found.says == [
        "resume goes on from checkpoint_epoch_1 (after epoch 1), the newest that is whole",
        "passed over checkpoint_epoch_3: checkpoint.pth is damaged: its sha256 is not what the manifest says",
        "passed over checkpoint_epoch_2: manifest.json is missing, so it was never finished or has been damaged",
    ]
    assert states(found) == [
        "damaged: checkpoint.pth is damaged: its sha256 is not what the manifest says",
        "damaged: manifest.json is missing, so it was never finished or has been damaged",
        "ok",
    ]


@pytest.mark.ray
def test_what_it_says_is_what_a_start_does(storage: Storage) -> None:
    for epoch in (1, 2, 3):
        save(storage, epoch)
    for broken in ([], ["checkpoint_epoch_3"], ["checkpoint_epoch_2"], ["checkpoint_epoch_1"]):
        for name in broken:
            damage(storage, name)
        taken = [row.name for row in survey(storage).rows if "resume takes this" in row.marks]
        try:
            origin = choose(Store(storage, Checkpoint(), ""), "auto")
        except CheckpointError:
            assert taken == [] and not survey(storage).usable
        else:
            assert origin is not None and [origin.name] == taken


def test_verify_reads_all_and_its_status_tells_of_any_damage(tmp_path: Path, capsys: Any) -> None:
    storage = LocalStorage(tmp_path)
    save(storage, 1)
    save(storage, 2)
    damage(storage, "checkpoint_epoch_1")
    assert main(["checkpoints", str(tmp_path)]) == 0
    assert re.search(r"checkpoint_epoch_1 .* not checked", capsys.readouterr().out)
    assert main(["checkpoints", str(tmp_path), "--verify"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"checkpoint_epoch_1 .* damaged: checkpoint.pth is damaged: its sha256", said)
    assert re.search(r"checkpoint_epoch_2 .* ok .* newest, resume takes this", said)


def test_a_run_of_which_nothing_can_be_trusted_ends_with_1(tmp_path: Path, capsys: Any) -> None:
    save(LocalStorage(tmp_path), 1)
    damage(LocalStorage(tmp_path), "checkpoint_epoch_1")
    assert main(["checkpoints", str(tmp_path)]) == 1
    assert "nothing can be trusted: none of the checkpoints of this run" in capsys.readouterr().out


def test_a_run_without_checkpoints_begins_at_step_0(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "ckpt").mkdir()
    assert main(["checkpoints", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "there is no checkpoint yet: training begins at step 0\n"


def test_a_complete_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    save(storage, 50)
    assert survey(storage).says == [
        "resume takes checkpoint_epoch_50, evaluates it, and is done: all 50 epochs are trained"
    ]
    save(storage, 50, accuracy=0.9)
    assert survey(storage).says == [
        "nothing is left to do: checkpoint_epoch_50 has all 50 epochs, trained and evaluated"
    ]


@pytest.mark.parametrize("whole", [True, False])
def test_what_a_dead_writer_left_is_told_and_taken_where_a_start_takes_it(tmp_path: Path, whole: bool) -> None:
    storage = LocalStorage(tmp_path)
    save(storage, 1)
    save(storage, 2)
    left = DEAD.format("checkpoint_epoch_2")
    storage.rename_tree("ckpt/checkpoint_epoch_2", f"ckpt/{left}")
    if not whole:
        storage.remove_tree(f"ckpt/{left}/manifest.json")
    found = survey(storage)
    store = Store(storage, Checkpoint(), "")
    store.clean_leftovers()
    origin = choose(store, "auto")
    assert origin is not None and found.says[0].startswith(f"resume goes on from {origin.name}")
    fate = "holds the whole of checkpoint_epoch_2; the next start puts it in its place"
    assert f"leftover: {left}" in found.says[1] and (fate in found.says[1]) == whole


def test_what_a_run_moved_aside_is_told(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    save(storage, 1)
    save(storage, 2)
    Store(storage, Checkpoint(), "second").supersede(Progress(1, 0, 23))
    found = survey(storage)
    assert list(marks(found)) == ["checkpoint_epoch_1"]
    assert found.says[1].startswith("superseded: checkpoint_epoch_2 (moved aside by launch second, which went back;")


def test_nothing_is_written(tmp_path: Path) -> None:
    save(LocalStorage(tmp_path), 1)
    save(LocalStorage(tmp_path), 2)
    damage(LocalStorage(tmp_path), "checkpoint_epoch_2")
    (tmp_path / "ckpt" / DEAD.format("checkpoint_epoch_3")).mkdir()

    def everything() -> list[Any]:
        return [(path, path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")]

    before = everything()
    assert main(["checkpoints", str(tmp_path), "--verify"]) == 1
    assert everything() == before


def test_a_run_that_saves_and_tidies_up_meanwhile_disturbs_nothing(tmp_path: Path) -> None:
    storage, stop = LocalStorage(tmp_path), threading.Event()
    save(storage, 1)
    store = Store(storage, Checkpoint(KEEP_LAST=1), "first")

    def train() -> None:
        epoch = 1
        while not stop.is_set():
            epoch += 1
            manifest = Manifest(Progress(epoch, 0, epoch), CONFIG, {**dict.fromkeys(WORLD, 1), "num_samples": 1438}, 0)
            store.save(dumps({"epoch": epoch, "it": epoch, "model_state": {"w": torch.ones(8)}}), manifest, NOW)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(20):
            found = survey(storage, every_byte=True)
            assert found.usable
    finally:
        stop.set()
        thread.join()
    found = survey(storage, every_byte=True)
    assert found.damaged == [] and len(found.rows) == 1


def test_the_folder_of_a_config_is_found_by_it(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("TASK: a:B\nOPTIMIZATION: {BATCH_SIZE_PER_GPU: 4, NUM_EPOCHS: 60}\n")
    save(LocalStorage(tmp_path / "output/run/other"), 50, accuracy=0.9)
    assert main(["checkpoints", "--cfg_file", "run.yaml", "--extra_tag", "other"]) == 0
    assert "resume goes on from checkpoint_epoch_50 (after epoch 50)" in capsys.readouterr().out


def test_a_folder_from_elsewhere_cannot_steer_the_terminal(tmp_path: Path, capsys: Any) -> None:
    save(LocalStorage(tmp_path), 1, launch="\x1b[2J[red]evil")
    assert main(["checkpoints", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "[2J[red]evil" in said


def test_sizes_and_ages_are_short() -> None:
    assert [size(n) for n in (12, 3850, 2_500_000, 6e11)] == ["12 B", "3.85 kB", "2.5 MB", "600 GB"]
    assert [age(s) for s in (-3, 5, 119, 120, 7200, 4e5)] == [
        *("0 s ago", "5 s ago", "119 s ago", "2 min ago", "2 h ago", "4 d ago")
    ]


def test_what_is_no_checkpoint_hides_none(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    sound = save(storage, 1)
    (tmp_path / "ckpt" / "checkpoint_epoch_2" / "manifest.json").mkdir(parents=True)
    (tmp_path / "ckpt" / "checkpoint_epoch_3").touch()
    (tmp_path / "ckpt" / ".writing-.writable-1.2-deadbeef").touch()
    (tmp_path / "ckpt" / "superseded").mkdir()
    (tmp_path / "ckpt" / "superseded" / "a-file").touch()
    found = survey(storage, every_byte=True)
    assert found.usable
    assert [(row.name, row.state[:7]) for row in found.rows] == [
        ("checkpoint_epoch_3", "damaged"),
        ("checkpoint_epoch_2", "damaged"),
        (sound, "ok"),
    ]
    assert any(sound in line and "resume goes on from" in line for line in found.says)
