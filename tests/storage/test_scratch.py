"""What a process leaves in TMPDIR and /dev/shm goes when it is dead and not before, whoever sees its process."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from multiprocessing.synchronize import SemLock
from pathlib import Path

import pytest

from raytrain.errors import PreflightError
from raytrain.storage import scratch
from raytrain.storage.scratch import kernel_id, named_by_this_process, own_mark, remove_abandoned

MAKE = "from raytrain.storage.scratch import ScratchFolder; print(ScratchFolder().path, flush=True); input()"
LOOK = "from raytrain.storage.scratch import remove_abandoned; remove_abandoned()"
# A child that the maker forked lives on: it holds nothing.
FORK = "import os, time; from raytrain.storage.scratch import ScratchFolder; path = ScratchFolder().path\n"
FORK += "if os.fork(): print(path, flush=True); input()\nelse: os.setsid(); time.sleep(10)"
HERE = [sys.executable, "-c"]
# In a container of its own: it sees no process of ours, and we see none of its by the numbers that it knows.
ELSEWHERE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc", *HERE]


def containers_are_possible() -> bool:
    return shutil.which("unshare") is not None and subprocess.run([*ELSEWHERE, ""], capture_output=True).returncode == 0


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


@pytest.mark.parametrize("is_killed", [False, True], ids=["living", "killed"])
@pytest.mark.parametrize(
    ("maker", "code", "looker"),
    [
        pytest.param(HERE, MAKE, HERE, id="all here"),
        pytest.param(HERE, FORK, HERE, id="its fork lives on"),
        pytest.param(HERE, MAKE, ELSEWHERE, id="seen from a container"),
        pytest.param(ELSEWHERE, MAKE, HERE, id="in a container"),
        pytest.param(ELSEWHERE, MAKE, ELSEWHERE, id="in another container"),
    ],
)
def test_a_folder_is_removed_if_its_maker_is_dead_in_whichever_container(
    temp_dir: Path, maker: list[str], code: str, looker: list[str], is_killed: bool
) -> None:
    if ELSEWHERE in (maker, looker) and not containers_are_possible():
        pytest.skip("no namespaces may be made here")
    with subprocess.Popen([*maker, code], stdin=-1, stdout=-1, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        if is_killed:
            process.kill()
            process.wait()
        subprocess.run([*looker, LOOK], check=True)
        assert folder.exists() is not is_killed
        if not is_killed:
            os.killpg(process.pid, signal.SIGKILL)


def test_what_others_have_made_is_never_touched(temp_dir: Path) -> None:
    ours = f"raytrain-4194304-{kernel_id()}-abcdefgh"  # nobody holds it
    others = [
        "raytrain-4194304-000000-abcdefgh",  # of another machine
        "raytrain-ray-4194304-abcdefgh",
        f"raytrain-4194304-{kernel_id()}-",
        "pymp-abcdefgh",
        "sem.mp-abcdefgh",
    ]
    for name in [ours, *others]:
        (temp_dir / name).mkdir()
    remove_abandoned()
    assert {path.name for path in temp_dir.iterdir()} == set(others)


def test_what_vanishes_or_belongs_to_a_user_without_a_name_stops_nothing(temp_dir: Path) -> None:
    unknown, dangling = (temp_dir / f"raytrain-1-{kernel_id()}-{letter * 8}" for letter in "ab")
    unknown.mkdir()
    if os.getuid() == 0:
        os.chown(unknown, 1000650000, 0)
    dangling.symlink_to(temp_dir / "missing")
    remove_abandoned()
    assert unknown.exists() is (os.getuid() == 0)


def test_a_link_is_not_followed(temp_dir: Path) -> None:
    (temp_dir / "kept").mkdir()
    (temp_dir / f"raytrain-1-{kernel_id()}-abcdefgh").symlink_to(temp_dir / "kept")
    remove_abandoned()
    assert (temp_dir / "kept").is_dir()


@pytest.mark.skipif(not Path(scratch.SEMAPHORES).is_dir(), reason="needs /dev/shm")
def test_semaphores_go_with_the_folder_that_they_are_named_after() -> None:
    folders = [Path(scratch.SEMAPHORES) / f"raytrain-1-{kernel_id()}-{letter * 8}" for letter in "yz"]
    semaphores = [folder.with_name(f"sem.{folder.name}-abcdefgh") for folder in folders]
    for folder, semaphore in zip(folders, semaphores, strict=True):
        folder.mkdir()
        semaphore.touch()
    lock = scratch.FolderLock(folders[0])
    try:
        remove_abandoned()
        assert [path.exists() for path in (*folders, *semaphores)] == [True, False, True, False]
    finally:
        lock.close()
        remove_abandoned()
    assert not any(path.exists() for path in (*folders, *semaphores))


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
