"""The run folder: one writer at a time, behind a URI as on a disk, and what made the run written down."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import s3_server
import torch
from small_runs import config

import raytrain
from raytrain.errors import ConfigError, PreflightError
from raytrain.journal.journal import Journal
from raytrain.journal.records import read_journal
from raytrain.journal.run_folder import RunFolder, environment, run_dir_of
from raytrain.launch import launch
from raytrain.storage.lock import locked
from raytrain.storage.scratch import own_mark
from raytrain.storage.storage import open_storage
from raytrain.training.preflight import LaunchOptions

LOG = SimpleNamespace(EVERY=1, LINE_EVERY=1)


def spools() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob(f"{own_mark()}-*"))


@pytest.fixture(params=["disk", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "run")
        return
    before = spools()
    with s3_server.serving() as server:
        yield server.uri("bucket/output/run")
    assert spools() == before


@pytest.mark.parametrize(("output", "fault"), [("~no-such-user/runs", "no user of that name"), ("a\0b", "NUL")])
def test_an_output_that_can_be_no_path_is_named_with_its_key(output: str, fault: str) -> None:
    cfg = SimpleNamespace(OUTPUT=output, EXP_GROUP_PATH="", TAG="run", EXTRA_TAG="default")
    with pytest.raises(ConfigError, match=rf"OUTPUT is .*: .*{fault}.* Write "):
        run_dir_of(cfg)  # type: ignore[arg-type]


def journal_of(folder: RunFolder) -> Journal:
    return Journal([*folder.sinks(), folder.log_sink(1_800_000_000.0)], LOG)


def kinds(uri: str) -> list[str]:
    return [record["kind"] for record in read_journal(open_storage(uri))]


def event(journal: Journal) -> None:
    journal.write("event", event="note", message="hello")


def step(journal: Journal) -> None:
    numbers = {"step": 1, "epoch": 0, "iteration": 0, "loss": 1.0, "grad_norm": 1.0, "lr": 0.1}
    rest = {"momentum": 0.9, "terms": {}, "disp": {}, "samples": 4, "data_s": 0.0, "step_s": 0.1}
    journal.step(**numbers, **rest)


def test_what_a_run_writes_is_in_its_folder(uri: str) -> None:
    with contextlib.closing(RunFolder(uri)) as folder:
        folder.storage.makedirs("")
        folder.describe("TASK: a:B\n", {"num_workers": 2})
        with contextlib.closing(journal_of(folder)) as journal:
            step(journal)
            event(journal)
            assert kinds(uri) == ["step", "event"]  # there at once, not only at the end
    storage = open_storage(uri)
    names = storage.list("")
    assert {"config.yaml", "environment.json", "journal.jsonl", "tensorboard"} <= set(names)
    assert any(name.startswith("train_") and name.endswith(".log") for name in names)
    assert storage.read_bytes("config.yaml") == b"TASK: a:B\n"
    assert storage.list("tensorboard")


def test_a_resumed_run_adds_to_its_journal(uri: str) -> None:
    for count in (1, 2, 3):
        with contextlib.closing(RunFolder(uri)) as folder, contextlib.closing(journal_of(folder)) as journal:
            folder.storage.makedirs("")
            event(journal)
        assert kinds(uri) == ["event"] * count


def test_the_folders_of_other_ranks_leave_rank_0s_files_alone(uri: str) -> None:
    """Each rank opens the run folder; only rank 0 writes. Behind a URI the others would publish the journal of old."""
    with contextlib.closing(RunFolder(uri)) as folder, contextlib.closing(journal_of(folder)) as journal:
        folder.storage.makedirs("")
        event(journal)
    other = RunFolder(uri)  # a rank that starts here, and ends after rank 0 has written
    with contextlib.closing(RunFolder(uri)) as first, contextlib.closing(journal_of(first)) as journal:
        event(journal)
    other.close()
    assert kinds(uri) == ["event", "event"]


def test_step_records_alone_are_not_copied_to_an_object_store() -> None:
    with s3_server.serving() as server, contextlib.closing(RunFolder(server.uri("bucket/run"))) as folder:
        journal = journal_of(folder)
        step(journal)
        journal.flush()
        assert not [name for name in server.objects if name.endswith("journal.jsonl")]
        event(journal)
        assert kinds(server.uri("bucket/run")) == ["step", "event"]
        journal.close()


def test_a_folder_that_trains_is_refused_to_a_second_run(tmp_path: Path) -> None:
    first, second = RunFolder(str(tmp_path)), RunFolder(str(tmp_path))
    with first.locked():
        with pytest.raises(PreflightError) as raised, second.locked(timeout_s=0.0):
            pass
        said = f"{tmp_path}: another run is training in this folder (process {os.getpid()} on "
        assert str(raised.value).startswith(said) and "--extra_tag" in str(raised.value)
    with second.locked(timeout_s=0.0):
        pass


def test_the_lock_of_a_killed_run_is_free_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from raytrain.journal.run_folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).locked():\n    print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder, holder.stdout:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(PreflightError, match=f"process {holder.pid} "), RunFolder(str(tmp_path)).locked(0.0):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with RunFolder(str(tmp_path)).locked(0.0):
        pass


@pytest.mark.parametrize(
    ("timeout_s", "told"),
    [(0.0, False), (0.1, False), (0.4, True), (0.5, True)],
)
def test_what_is_waited_for_is_told_once_and_not_of_one_that_is_just_dying(
    tmp_path: Path, timeout_s: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytrain.storage.lock.TELL_AFTER_S", 0.2)
    lines: list[str] = []
    first, second = RunFolder(str(tmp_path)).locked(), RunFolder(str(tmp_path)).locked(timeout_s, lines.append)
    with first, pytest.raises(PreflightError), second:
        pass
    assert len(lines) == told
    for line in lines:
        assert line.startswith(f"{tmp_path}: another run is training in this folder (process {os.getpid()} on ")
        assert line.endswith(f"; its end is waited for, {timeout_s:.0f} s at most")


def test_a_run_that_waits_for_its_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytrain.storage.lock.TELL_AFTER_S", 0.0)
    cfg = config(tmp_path, "PointsTask", {})
    folder = Path(run_dir_of(cfg))
    folder.mkdir(parents=True)
    said: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(open_storage(str(folder))))

        def show(record: dict[str, Any]) -> None:
            said.append(record)
            if record.get("event") == "waiting":
                stack.close()

        assert launch(cfg, LaunchOptions(), show).status == "finished"
    waiting = next(record for record in said if record.get("event") == "waiting")
    assert f"(process {os.getpid()} on " in waiting["message"]


def test_a_dying_run_is_waited_for(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(RunFolder(str(tmp_path)).locked())
        waiting = RunFolder(str(tmp_path)).locked(timeout_s=20.0)
        threading.Timer(0.3, stack.pop_all().close).start()
        with waiting:
            pass


def test_environment_says_what_made_these_weights(tmp_path: Path) -> None:
    RunFolder(str(tmp_path)).describe("", {"cfg_file": Path("a.yaml"), "workers": None})
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found == json.loads(json.dumps(environment({"cfg_file": "a.yaml", "workers": None})))
    assert found["torch"] == torch.__version__ and found["argv"] == sys.argv
    assert found["arguments"] == {"cfg_file": "a.yaml", "workers": "None"}
    assert {"raytrain", "python", "numpy", "ray", "platform", "cpus", "gpus", "cuda"} <= set(found)


def test_the_commit_of_the_current_folder_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = tmp_path / "project" / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    below = tmp_path / "project" / "tools"
    below.mkdir()
    monkeypatch.chdir(below)
    (git / "HEAD").write_text("0123abc\n")
    assert environment({})["git"] == "0123abc"
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert environment({})["git"] is None  # no commit yet
    (git / "refs" / "heads" / "main").write_text("4567def\n")
    assert environment({})["git"] == "4567def"
    (git / "refs" / "heads" / "main").unlink()
    (git / "packed-refs").write_text("# pack-refs with: peeled\n89ab012 refs/heads/main\n^0000000\n")
    assert environment({})["git"] == "89ab012"


def test_a_launch_on_ray_into_a_folder_that_a_run_trains_in_is_refused_before_ray_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytrain.cluster.on_ray.locked", functools.partial(locked, timeout_s=0.0))
    cfg = config(tmp_path, "PointsTask", {})
    folder = Path(run_dir_of(cfg))
    folder.mkdir(parents=True)
    with locked(open_storage(str(folder))), pytest.raises(PreflightError, match="another run is training in this"):
        raytrain.train(cfg, num_workers=2, quiet=True)


def test_a_process_that_the_task_forks_does_not_hold_the_run_folder(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom raytrain.storage.lock import locked\n"
        "from raytrain.storage.storage import open_storage\n"
        "with locked(open_storage(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if not child: time.sleep(60)\n"
        "    print(child, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        try:
            with locked(open_storage(str(tmp_path)), timeout_s=5.0):
                assert Path(f"/proc/{child}").exists()
        finally:
            os.kill(child, signal.SIGKILL)
