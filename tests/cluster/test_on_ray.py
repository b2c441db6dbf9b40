"""Real runs on Ray: what Ray knows of them, what a user sees when one fails, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import s3_server

import raytrain
from raytrain import launch
from raytrain.cluster import driver
from raytrain.config.sections import Config
from raytrain.errors import TrainingError
from raytrain.journal.records import Record, read_journal
from raytrain.storage.state_file import load_weights_file
from raytrain.storage.storage import open_storage
from raytrain.training.preflight import LaunchOptions

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs" / "digits.yaml"


def config(output: Path | str, task: str, **sections: Any) -> Config:
    tree = {
        "TASK": f"tasks_for_units:{task}",
        "OUTPUT": str(output),
        "OPTIMIZATION": {"BATCH_SIZE_PER_GPU": 4, "NUM_EPOCHS": 2},
        "SCALE": {"NUM_WORKERS": 2, "USE_GPU": False},
        "LOADER": {"WORKERS": 0},
        "LOG": {"EVERY": 1},
        **sections,
    }
    return Config.model_validate(tree)


def test_two_workers_train_digits_and_ray_knows_the_checkpoints_and_metrics(ray_address: str, tmp_path: Path) -> None:
    cfg = raytrain.load_config(DIGITS, ["OUTPUT", str(tmp_path), "OPTIMIZATION.NUM_EPOCHS", "2"])
    result = raytrain.train(cfg, quiet=True)
    assert result.status == "finished" and result.metrics["accuracy"] > 0.9

    import ray.train

    told = ray.train.Result.from_path(result.run_dir)
    assert told.checkpoint is not None and told.checkpoint.path == result.checkpoint
    assert told.metrics == result.metrics
    expected = [f"{result.run_dir}/ckpt/checkpoint_epoch_{epoch}" for epoch in (1, 2)]
    assert [checkpoint.path for checkpoint, _ in told.best_checkpoints] == expected
    evals = [r["metrics"] for r in read_journal(Path(result.run_dir) / "journal.jsonl") if r["kind"] == "eval"]
    assert [metrics for _, metrics in told.best_checkpoints] == evals
    assert load_weights_file(f"{told.checkpoint.path}/checkpoint.pth")["epoch"] == 2
    assert {path.name for path in (Path(result.run_dir) / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}


def test_a_finished_run_is_complete_and_a_longer_one_goes_on_after_retention_has_removed_what_ray_lists(
    ray_address: str, tmp_path: Path
) -> None:
    sections = {"CHECKPOINT": {"KEEP_LAST": 1}}
    first = raytrain.train(config(tmp_path, "PredictingTask", **sections), quiet=True)
    snapshot = json.loads((Path(first.run_dir) / "checkpoint_manager_snapshot.json").read_text())
    assert len(snapshot["checkpoint_results"]) == 2  # Ray lists two; one is left
    assert [path.name for path in (Path(first.run_dir) / "ckpt").iterdir()] == ["checkpoint_epoch_2"]
    assert raytrain.train(config(tmp_path, "PredictingTask", **sections), quiet=True).status == "complete"
    longer = {"BATCH_SIZE_PER_GPU": 4, "NUM_EPOCHS": 3}
    result = raytrain.train(config(tmp_path, "PredictingTask", **sections, OPTIMIZATION=longer), quiet=True)
    assert result.status == "finished" and str(result.checkpoint).endswith("checkpoint_epoch_3")


def test_a_run_behind_a_uri_trains_on_two_workers_and_goes_on_in_one_process(ray_address: str) -> None:
    with s3_server.serving() as server:
        first = raytrain.train(config(server.uri("bucket/runs"), "PredictingTask"), quiet=True)
        assert first.status == "finished"
        longer = {"BATCH_SIZE_PER_GPU": 4, "NUM_EPOCHS": 3}
        cfg = config(server.uri("bucket/runs"), "PredictingTask", OPTIMIZATION=longer)
        result = raytrain.train(cfg, num_workers=0, quiet=True)
        storage = open_storage(server.uri("bucket/runs/run/default"))
        assert result.status == "finished" and result.run_dir == storage.path_of("")
        records = read_journal(storage)
        assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, 19))
        assert [r["epoch"] for r in records if r["kind"] == "eval"] == [1, 2, 3]
        assert storage.list("ckpt") == ["checkpoint_epoch_1", "checkpoint_epoch_2", "checkpoint_epoch_3"]


def test_a_rank_that_fails_is_one_screen_with_rank_step_and_the_users_own_lines(
    ray_address: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError) as raised:
        raytrain.train(config(tmp_path, "FailsOnRank1"), quiet=True)
    screen = str(raised.value)
    assert len(screen.split("\n")) <= 40
    log = tmp_path / "run" / "default" / "logs" / "rank_1.log"
    for part in ("rank 1", "step 7", "epoch", "explode(batch[0])", "RuntimeError: no anchors for 4 points", str(log)):
        assert part in screen, screen
    assert "raytrain/training/loop.py" not in screen and "ray/train" not in screen
    assert "RuntimeError: no anchors for 4 points" in log.read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_log_that_cannot_be_opened_is_told_as_that_and_not_as_a_want_of_memory(
    ray_address: str, tmp_path: Path, rank: int
) -> None:
    log = tmp_path / "run" / "default" / "logs" / f"rank_{rank}.log"
    log.mkdir(parents=True)
    with pytest.raises(TrainingError) as raised:
        raytrain.train(config(tmp_path, "PredictingTask"), quiet=True)
    assert str(raised.value).startswith(f"{log}: cannot write this log: Is a directory. Something else stands")
    assert "memory" not in str(raised.value)


def test_a_worker_that_dies_three_times_in_one_step_is_one_screen_with_its_rank_and_the_likely_reason(
    ray_address: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError) as raised:
        raytrain.train(config(tmp_path, "DiesOnRank1", CHECKPOINT={"SNAPSHOT_EVERY": None}), quiet=True)
    screen = str(raised.value)
    for part in ("failed on rank 1", "died without a word", "ran out of memory", str(tmp_path)):
        assert part in screen, screen
    # 3, unless rank 0 was gone before it could say so: workers tell their step a few times a second.
    assert re.search(r"It failed 3 times in a row without getting beyond step [123], so it was given up", screen)
    assert len(screen.split("\n")) <= 12 and "ActorMetadata" not in screen


def test_a_run_that_waits_for_room_on_a_busy_cluster_says_so_and_ends_soon_after_ctrl_c(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    monkeypatch.setattr(driver, "WAIT_NOTICE_S", 0.5)
    others = placement_group([{"CPU": 7.0}])
    assert others.wait(10)
    stop, wished_at, said = threading.Event(), 0.0, []

    def show(record: Record) -> None:
        nonlocal wished_at
        said.append((record["event"], record["message"]))
        wished_at = wished_at or time.monotonic()
        stop.set()

    try:
        result = launch.launch(config(tmp_path, "PredictingTask"), LaunchOptions(), show, stop)
        took_s = time.monotonic() - wished_at
    finally:
        remove_placement_group(others)
    assert result.status == "stopped" and took_s < 20, took_s  # it was up to a minute
    assert said[0] == ("waiting", "the cluster has no room yet: CPU 2 (1 free)")
    assert [event for event, _ in said[1:]] == ["stopped"]


# One command on a cluster of its own

LINES = [
    r"digits\(default\): 2 workers \(cpu\), 1,438 samples, 2 epochs of 23 steps",
    r"  a step: 2 virtual workers x batch size 32 = 64 samples",
    r"(epoch \d/2  step \d+/46  loss \S+  lr \S+  grad \S+  [\d,]+ samples/s  ETA \S+\n)+"
    r"epoch 1  accuracy 0\.\d+.*",
    r"(epoch \d/2  step \d+/46  loss \S+  lr \S+  grad \S+  [\d,]+ samples/s  ETA \S+\n)+"
    r"epoch 2  accuracy 0\.\d+.*",
    r"finished after epoch 2, step 46 in \d+:\d\d",
    r"(  \w[\w ]*\w  +\S.*\n)+",
]


def test_a_command_on_a_cluster_of_its_own_says_only_what_is_ours_and_leaves_nothing_behind(tmp_path: Path) -> None:
    marker, shared = f"{uuid.uuid4()}", set[Path]()
    temp = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))  # short: sockets lie below it
    env = {**os.environ, "RAYTRAIN_TEST_MARKER": marker, "TMPDIR": str(temp), "COLUMNS": "200"}
    env.pop("RAY_ADDRESS", None)
    words = [sys.executable, "-m", "raytrain", "train", "--cfg_file", str(DIGITS), "--epochs", "2"]
    words += ["--output", str(tmp_path / "out"), "--workers", "1"]
    files = [tmp_path / "out.txt", tmp_path / "err.txt"]
    with files[0].open("wb") as stdout, files[1].open("wb") as stderr:
        process = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=stdout, stderr=stderr)
    while process.poll() is None:
        shared |= shared_memory_of(marker)
        time.sleep(0.1)
    out, err = (file.read_text() for file in files)
    assert (process.returncode, err) == (0, ""), out + err
    assert shared  # Ray's object store at least
    assert re.fullmatch("\n".join(LINES), out), out
    assert (tmp_path / "out" / "digits" / "default" / "ckpt" / "checkpoint_epoch_2").exists()

    def left_behind() -> list[str]:
        left = [f"process {text}" for text in marked_processes(marker)]
        left += [str(path) for path in Path("/tmp").glob(f"raytrain-ray-{process.pid}-*")]
        left += [str(path) for path in shared if path.exists()]
        # torch makes this cache for every user, as soon as an optimizer is made.
        return left + [str(path) for path in temp.iterdir() if not path.name.startswith("torchinductor_")]

    deadline = time.monotonic() + 20
    while left := left_behind():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    shutil.rmtree(temp)


def marked_processes(marker: str, file: str = "cmdline") -> list[str]:
    """That file in /proc of each process with `marker` in its environment, which children inherit."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if marker.encode() in (folder / "environ").read_bytes():
                found.append((folder / file).read_text().replace("\0", " "))
    return found


def shared_memory_of(marker: str) -> set[Path]:
    """What these processes have mapped of /dev/shm, where tests that run beside this one have theirs too."""
    lines = "\n".join(marked_processes(marker, "maps")).splitlines()
    return {Path(line.split()[5]) for line in lines if "/dev/shm/" in line}
