"""What a process leaves in TMPDIR and /dev/shm is known by its name, and goes when it is dead and not before."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing.synchronize import SemLock
from pathlib import Path

import pytest

from raytrain.errors import PreflightError
from raytrain.storage import scratch
from raytrain.storage.scratch import named_by_this_process, own_mark, remove_abandoned, system_id

MAKE = "from raytrain.storage.scratch import ScratchFolder; print(ScratchFolder().path, flush=True); input()"


@pytest.fixture
def temp_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_scratch_folder_goes_with_its_process_or_when_that_was_killed(temp_dir: Path) -> None:
    makers = [subprocess.Popen([sys.executable, "-c", MAKE], stdin=-1, stdout=-1, text=True) for _ in range(2)]
    folders = [Path(maker.stdout.readline().strip()) for maker in makers if maker.stdout]
    for folder in folders:
        (folder / "part").write_text("x")
    remove_abandoned()
    assert set(temp_dir.iterdir()) == set(folders)
    makers[0].kill()
    makers[0].communicate()
    remove_abandoned()
    assert set(temp_dir.iterdir()) == {folders[1]}
    makers[1].communicate("\n")
    assert set(temp_dir.iterdir()) == set()


def test_what_others_have_made_is_never_touched(temp_dir: Path) -> None:
    ours = f"raytrain-{system_id()}-{os.getpid()}.1-abcdefgh"  # this process was not started then
    others = [
        f"raytrain-{'0' * 8}-{os.getpid()}.1-abcdefgh",  # of another container
        f"raytrain-ray-{os.getpid()}-abcdefgh",
        f"{own_mark()}-abcdefgh",
        "pymp-abcdefgh",
        "sem.mp-abcdefgh",
    ]
    for name in [ours, *others]:
        (temp_dir / name).mkdir()
    remove_abandoned()
    assert {path.name for path in temp_dir.iterdir()} == set(others)


def test_a_link_is_removed_and_not_followed(temp_dir: Path) -> None:
    (temp_dir / "kept").mkdir()
    (temp_dir / f"raytrain-{system_id()}-1.1-abcdefgh").symlink_to(temp_dir / "kept")
    remove_abandoned()
    assert [path.name for path in temp_dir.iterdir()] == ["kept"]


@pytest.mark.skipif(not Path(scratch.SEMAPHORES).is_dir(), reason="needs /dev/shm")
@pytest.mark.parametrize("named_by", ["multiprocessing", "joblib"])
def test_semaphores_have_their_makers_name_in_the_block_alone(named_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if named_by == "joblib":  # what it does to multiprocessing when it is imported, as by scikit-learn
        names = (f"/loky-{os.getpid()}-{number}" for number in itertools.count())
        monkeypatch.setattr(SemLock, "_make_name", staticmethod(lambda: next(names)))
    context = multiprocessing.get_context("forkserver")
    with named_by_this_process():
        inside = context.Semaphore()
    assert inside._semlock.name.startswith(f"/{own_mark()}-")  # type: ignore[attr-defined]
    assert not context.Semaphore()._semlock.name.startswith(f"/{own_mark()}-")  # type: ignore[attr-defined]


def test_a_temp_dir_too_long_for_sockets_is_named_where_there_is_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    assert str(scratch.socket_scratch().path).startswith("/tmp/raytrain-")
    monkeypatch.setattr(scratch, "SHORT", str(tmp_path / "missing"))
    with pytest.raises(PreflightError, match=r"TMPDIR is .*x, which is too long for the sockets of loader workers"):
        scratch.socket_scratch()
