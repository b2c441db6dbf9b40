"""What tests share: one Ray cluster a session (a process of `make test` is one), and a folder for what they leave."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Pair

# For numpy, scipy and torch here and in what is started from here; a run has its own SCALE.THREADS. Threads that
# wait for each other on cores that other tests use make a Gaussian process take three times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files that share what one of them has made at some cost: the same process gets them, one after the other.
TOGETHER = {"tests/promises/test_sweeps_stopped.py": "tests/promises/test_sweeps.py"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files for each process, as --dist loadfile has it, and those of TOGETHER as one."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file, file)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that are skipped without a GPU have the mark gpu; where several processes share the files, those with the
    most whole runs come first, or one process ends long alone."""
    for item in items:
        if any(str(mark.kwargs.get("reason")).startswith("needs a GPU") for mark in item.iter_markers("skipif")):
            item.add_marker("gpu")
    if hasattr(config, "workerinput"):  # set by pytest-xdist
        runs = Counter(item.path for item in items if item.get_closest_marker("ray"))
        items.sort(key=lambda item: -runs[item.path])


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_reaches_what_is_started() -> None:
    """A shell starts what it puts in the background deaf to SIGINT, and so would be all that is started from here."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def nothing_left_in_tmp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What killed processes can remove no more, and what torchrun never does, goes with the session.

    A folder of its own for all temporary files, short as sockets lie below it; and the semaphores of loader
    workers that were killed together with what would have removed them.
    """
    tmp_path_factory.getbasetemp()  # stays where it was: a failed test's files are looked at afterwards
    folder, before = tempfile.mkdtemp(prefix="rt-", dir="/tmp"), set(semaphores())
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TMPDIR", folder)  # of what is started from here; this process has looked before
        patched.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
        yield
    shutil.rmtree(folder, ignore_errors=True)
    left = set(semaphores()) - before  # before one looks who has them: other sessions make new ones meanwhile
    mapped = {line.split()[4] for process in Path("/proc").glob("[0-9]*") for line in maps_of(process)}
    for semaphore in left:
        with contextlib.suppress(FileNotFoundError):
            if str(semaphore.stat().st_ino) not in mapped:  # by inode: whoever made it has it by another name
                semaphore.unlink()


def semaphores() -> Iterator[Path]:
    return Path("/dev/shm").glob("sem.mp-*")


def maps_of(process: Path) -> list[str]:
    """Lines on the semaphores that it has."""
    try:
        return [line for line in (process / "maps").read_text().splitlines() if "/dev/shm/sem." in line]
    except OSError:  # it has ended, or is another user's
        return []


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a cluster of 8 CPUs (said, not had); this process is connected to it."""
    import ray

    from raytrain.cluster import cluster

    with cluster.starting("local", num_cpus=8) as started:
        started.connect()
        yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes joined by gloo."""
    with contextlib.closing(Pair(tmp_path_factory.mktemp("pair") / "meeting")) as processes:
        yield processes
