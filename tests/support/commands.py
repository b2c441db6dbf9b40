"""Commands that tests start, and what is left of their processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from forks import Fork, forks

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
DEADLINE_S = 90.0  # a healthy launch on two busy cores takes 20 s


def environment() -> dict[str, str]:
    """Of a command that tests start."""
    return {**os.environ, "PYTHONPATH": f"{SUPPORT}{os.pathsep}{ROOT}", "COLUMNS": "200"}


def commanded(words: list[str], folder: Path, env: Mapping[str, str] | None = None) -> Launched:
    """`raytrain` with these words, in a process group of its own; a fork unless `env` has words for Python itself."""
    is_pythons = env is not None and not env.keys().isdisjoint({"PYTHONIOENCODING", "PYTHONHASHSEED"})
    output, env = folder / f"output-{time.time_ns()}.txt", {**environment(), **(env or {})}
    if is_pythons:
        return Launched.of([sys.executable, "-m", "raytrain", *words], folder, env)
    output.touch()
    return Launched(forks().start(["raytrain", *words], folder, env, output), output)


def torchrun(program: Sequence[str], folder: Path, *options: str, **env: str) -> Launched:
    """`torchrun --nproc_per_node 2` of that program of Python's, in a process group of its own."""
    words = ["torchrun", "--standalone", "--nproc_per_node", "2", *options, "--no-python", sys.executable, *program]
    output = folder / f"output-{time.time_ns()}.txt"
    output.touch()
    return Launched(forks().start(words, folder, {**environment(), "OMP_NUM_THREADS": "1", **env}, output), output)


class Launched:
    """A command that runs. Its output goes to a file, so that no reader can hold it up."""

    def __init__(self, process: subprocess.Popen[bytes] | Fork, output: Path) -> None:
        self.process, self._output = process, output

    @classmethod
    def of(cls, command: list[str], folder: Path, env: Mapping[str, str]) -> Launched:
        output = folder / f"output-{time.time_ns()}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=folder, env=dict(env), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        return cls(process, output)

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        return self._output.read_text()

    def ended(self, status: int) -> str:
        """What it printed, once it has ended with this exit status."""
        try:
            found = self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            found = "still running"
            os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()
        assert found == status, f"exit status {found}, not {status}:\n{self.output()}"
        return self.output()

    def kill(self, workers: list[int], workers_too: bool = True) -> None:
        """SIGKILL for it and for its workers; returns when all that they had started is gone, and the workers are."""
        everyone = {pid for root in {self.pid, *workers} for pid in family(root)}
        for pid in {self.pid, *workers} if workers_too else {self.pid}:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        gone(everyone)


def terminate_all(pid: int) -> None:
    """SIGTERM to all processes of a command, as systemd and Slurm send it; and twice to itself, as `timeout` does."""
    for each in [*family(pid), pid]:
        with contextlib.suppress(ProcessLookupError):  # it has ended with one before it
            os.kill(each, signal.SIGTERM)


def gone(pids: set[int]) -> None:
    """Returns when none of these processes is left.

    The two agents of a Ray cluster whose head was killed ask for it for a minute before they end; that is
    Ray's own and not waited for.
    """
    agents = {pid for pid in pids if is_agent(pid)}
    wait_for(lambda: not any(alive(pid) for pid in pids - agents), "the end of all processes of a killed run")
    for pid in agents:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(alive(pid) for pid in agents), "the end of Ray's agents")


def is_agent(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith((b"ray::DashboardAgent", b"ray::RuntimeEnvAgent"))
    except OSError:  # it has ended
        return False


def family(pid: int) -> Iterator[int]:
    """The process and all below it."""
    yield pid
    for child in children_of(pid):
        yield from family(child)


def children_of(pid: int) -> list[int]:
    """Threads and processes may end while one looks."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += map(int, (task / "children").read_text().split())
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(claim: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """What `claim` gives, once that is true."""
    give_up = time.monotonic() + deadline_s
    while not (found := claim()):
        assert time.monotonic() < give_up, f"waited {deadline_s:g} s in vain for {what}"
        time.sleep(0.02)
    return found
