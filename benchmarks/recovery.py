"""Seconds from SIGKILL of a worker to the next new step, and steps repeated: `python -m benchmarks.recovery`.

A run of 420 steps of 50 ms on two workers, saved every 10 steps, loses one of them in step 396. The next new step is
the first one beyond those that had begun; repeated are those that were through and are trained once more.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.contenders import TORCHRUN
from benchmarks.measure import (
    TAIL_LINES,
    BenchmarkError,
    end_all,
    environment,
    interleaved,
    machine,
    machine_line,
    ratios,
    run,
    say,
    scratch,
    spread,
    table,
    write_json,
)
from benchmarks.pieces import LR, OVERHEAD, SEED, WEIGHT_DECAY
from benchmarks.restarting import KILLED_IN, SAVE_EVERY, STEPS_FILE

ROUNDS = 5
TIMEOUT_S = 120.0
LOOK_S = 0.01
# Without it one restart of torchrun in three fails on the address of the store that has gone.
TORCHRUN_ENV = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@dataclasses.dataclass(frozen=True)
class Begun:
    """That process `pid` began a step (counted from 0) at time.time()."""

    at: float
    step: int
    pid: int


@dataclasses.dataclass(frozen=True)
class Recovery:
    """What one kill cost. restart_s: up to the first step of the new workers, whichever step that is"""

    new_step_s: float
    restart_s: float
    repeated: int


def raytrain(folder: Path) -> list[str]:
    """`raytrain train`, as a user types it; that a worker that dies is started again is its default."""
    config = {
        "TASK": "benchmarks.restarting:Restarting",
        "SEED": SEED,
        "OUTPUT": str(folder / "output"),
        "MODEL": {"FOLDER": str(folder)},
        "OPTIMIZATION": {
            "OPTIMIZER": "adamw",
            "SCHEDULER": "constant",
            "LR": LR,
            "WEIGHT_DECAY": WEIGHT_DECAY,
            "BATCH_SIZE_PER_GPU": OVERHEAD.batch_size,
            "NUM_EPOCHS": 1,
            "GRAD_NORM_CLIP": None,
        },
        "SCALE": {"NUM_WORKERS": 2, "USE_GPU": False},
        "LOADER": {"WORKERS": 0},
        "CHECKPOINT": {"EVERY_STEPS": SAVE_EVERY},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "raytrain", "train", "--cfg_file", str(folder / "run.yaml")]


def torchrun(folder: Path) -> list[str]:
    return [*TORCHRUN, "--max-restarts", "3", "-m", "benchmarks.restarting", "torchrun", str(folder)]


def ray_idiom(folder: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.restarting", "ray", str(folder)]


CONTENDERS: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "torchrun": ("torchrun --max-restarts, hand-written DDP", torchrun),
    "raytrain": ("raytrain under Ray", raytrain),
    "ray-train": ("Ray Train, the documented idiom", ray_idiom),
}


def killed_run(command: Callable[[Path], list[str]], folder: Path) -> Recovery:
    """A whole run, with one worker killed in step KILLED_IN; BenchmarkError if it does not get over it."""
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as made:
        own = Path(made)
        with open(own / "printed.txt", "wb") as printed:
            process = subprocess.Popen(
                command(own),
                cwd=own,
                env={**environment(folder), **TORCHRUN_ENV},
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                start_new_session=True,
            )
        try:
            before = awaited(own, process, lambda begun: begun[-1].step >= KILLED_IN)
            os.kill(before[-1].pid, signal.SIGKILL)
            killed_at = time.time()
            old = {each.pid for each in before}
            after = awaited(own, process, lambda begun: new_step(old, begun) is not None)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TIMEOUT_S)
            if process.returncode != 0:
                raise failed(own, process)
        finally:
            if process.poll() is None:
                end_all(process)
    return recovery(old, killed_at, after)


def awaited(folder: Path, process: subprocess.Popen[bytes], come: Callable[[list[Begun]], bool]) -> list[Begun]:
    """The steps begun so far, once `come` is true of them."""
    give_up = time.monotonic() + TIMEOUT_S
    while not ((begun := steps_begun(folder)) and come(begun)):
        if process.poll() is not None or time.monotonic() > give_up:
            raise failed(folder, process)
        time.sleep(LOOK_S)
    return begun


def steps_begun(folder: Path) -> list[Begun]:
    """In the order in which they were written down."""
    with contextlib.suppress(FileNotFoundError):
        lines = [line.split() for line in (folder / STEPS_FILE).read_text().split("\n")[:-1]]
        return [Begun(float(at), int(step), int(pid)) for at, step, pid in lines]
    return []


def failed(folder: Path, process: subprocess.Popen[bytes]) -> BenchmarkError:
    how = "is not done" if process.poll() is None else f"ended with status {process.returncode}"
    tail = "\n".join((folder / "printed.txt").read_text(errors="replace").splitlines()[-TAIL_LINES:])
    return BenchmarkError(f"`{process.args!r}` {how}; the end of what it printed:\n{tail}")


def new_step(old: set[int], begun: list[Begun]) -> Begun | None:
    """The first step of other processes than `old` that none of those had begun; they may go on for a step."""
    highest = max(each.step for each in begun if each.pid in old)
    return next((each for each in begun if each.pid not in old and each.step > highest), None)


def recovery(old: set[int], killed_at: float, begun: list[Begun]) -> Recovery:
    """old: the processes of which one was killed"""
    new, again = new_step(old, begun), next(each for each in begun if each.pid not in old)
    assert new is not None  # it was waited for
    highest = max(each.step for each in begun if each.pid in old)
    return Recovery(new.at - killed_at, again.at - killed_at, highest - again.step)


def measure(keys: list[str], rounds: int) -> dict[str, Any]:
    """The report: what a kill cost each, by round."""
    with scratch() as folder:
        runs = {key: partial(killed_run, CONTENDERS[key][1], folder) for key in keys}
        found = interleaved(runs, rounds, lambda text: say(f"recovery: {text}"), needed=["torchrun"])
    new_step_s = {key: [each.new_step_s for each in recoveries] for key, recoveries in found.items()}
    return {
        key: {
            "name": CONTENDERS[key][0],
            "new_step_s": new_step_s[key],
            "ratio": ratios(new_step_s[key], new_step_s["torchrun"]),
            "restart_s": [each.restart_s for each in found[key]],
            "repeated": [each.repeated for each in found[key]],
        }
        for key in found
    }


def shown(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    heads = ["a worker is killed", "to the next new step: s", "x torchrun", "to any step: s", "steps repeated"]
    rows = [
        [
            each["name"],
            spread(each["new_step_s"]),
            spread(each["ratio"], 2),
            spread(each["restart_s"]),
            spread(each["repeated"], 0),
        ]
        for each in report.values()
    ]
    return f"recovery: {len(report['torchrun']['ratio'])} rounds\n\n{table(heads, rows)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", metavar="NAME,...", help=", ".join(CONTENDERS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    args = parser.parse_args()
    keys = list(CONTENDERS) if args.only is None else ["torchrun", *args.only.split(",")]
    if unknown := set(keys) - set(CONTENDERS):
        sys.exit(f"--only: there is no {', '.join(sorted(unknown))}; there are {', '.join(CONTENDERS)}")
    found = machine()
    print(machine_line(found))
    report = measure(list(dict.fromkeys(keys)), args.rounds)
    print(f"\n{shown(report)}")
    write_json(args.json, {"machine": found, "recovery": report})
    return 0 if report.keys() == set(keys) else 1


if __name__ == "__main__":
    sys.exit(run(main))
