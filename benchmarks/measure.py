"""Rounds, commands and tables: how anything here is measured and shown."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
TAIL_LINES = 60  # torchrun says much after the error itself
ENDING_S = 15.0  # a command past its time may take this long to end by itself


class BenchmarkError(Exception):
    """A measurement that cannot be had, and why."""


def interleaved(
    measures: Mapping[str, Callable[[], T]], rounds: int, say: Callable[[str], None], needed: Sequence[str] = ()
) -> dict[str, list[T]]:
    """What each measure gave in each round; every round begins with another one, so that none is always first.

    One that fails twice is left out with a word, unless it is `needed`: the hour that the others took is not lost.
    """
    found: dict[str, list[T]] = {name: [] for name in measures}
    for number in range(rounds):
        names = list(found)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            say(f"round {number + 1}/{rounds}  {name}")
            try:
                found[name].append(tried_twice(measures[name], say))
            except BenchmarkError as error:
                if name in needed:
                    raise
                say(f"FAILED: {name} is left out: {error}")
                del found[name]
    return found


def tried_twice(measure: Callable[[], T], say: Callable[[str], None]) -> T:
    """What `measure` gives; gloo has been seen to abort a process of a hand-written loop on a crowded machine."""
    try:
        return measure()
    except BenchmarkError as error:
        say(f"once more, since it failed: {error}")
        return measure()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the time of the block; not in TMPDIR, since Ray's sockets lie below it and need a short path."""
    with tempfile.TemporaryDirectory(prefix="rb-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def environment(folder: Path) -> dict[str, str]:
    """What every command gets: one thread, this repository's modules, and temporary files below `folder`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(folder), "TMPDIR": str(folder)}
    return {**os.environ, **own}


def run_command(
    words: Sequence[str], folder: Path, timeout_s: float, expected: Sequence[int] = (0,)
) -> tuple[float, float]:
    """Run to the end in `folder`; time.time() before and after.

    BenchmarkError, with the end of what it printed, if its status is none of those expected or it takes longer; then
    it and all that it started is ended.
    """
    printed = folder / "printed.txt"
    with open(printed, "wb") as file:
        began = time.time()
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=environment(folder),
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            ended = time.time()
            if process.poll() is None:
                end_all(process)
    if status not in expected:
        how = f"was not done after {timeout_s:.0f} s" if status is None else f"ended with status {status}"
        tail = "\n".join(printed.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        raise BenchmarkError(f"`{' '.join(words)}` {how}; the end of what it printed:\n{tail}")
    return began, ended


def end_all(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads its group, and all that it started: with SIGTERM, then with SIGKILL."""
    started = descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(ENDING_S)
    for pid in [process.pid, *started]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """The processes below `pid`, by /proc; none where there is no /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:  # grows while it is walked
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, and in brackets least and most."""
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Round by round: what a slow minute of the machine does to both does not count."""
    return [value / base for value, base in zip(values, reference, strict=True)]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns padded for a terminal."""
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    lines = [heads, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    versions = {name: importlib.metadata.version(name) for name in ("raytrain", "torch", "ray")}
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **versions,
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine_line(found: dict[str, Any]) -> str:
    return (
        f"{found['date']}, {found['cpu']}, {found['cores']} cores (load before: {found['load']:.1f}), "
        f"Python {found['python']}, torch {found['torch']}, ray {found['ray']}, raytrain {found['raytrain']}"
    )


def run(main: Callable[[], int]) -> int:
    """The exit status of a command; 1, and why, where a measurement that is needed failed."""
    try:
        return main()
    except BenchmarkError as error:
        say(f"FAILED: {error}")
        return 1


def say(text: str) -> None:
    """Progress, beside the tables."""
    print(text, file=sys.stderr, flush=True)


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")
