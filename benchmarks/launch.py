"""Seconds from a command to its first step, and to its end, for a run of 5 steps: `python -m benchmarks.launch`.

The first step is where the training function first calls the model, by the same watch as in loop.py. Rounds are
interleaved; the first one, which may read modules from disk, is shown apart. Phases come from outside raytrain:
when its processes were started (/proc), when it called the task, and when the command was given and had ended.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import (
    HAND_DDP,
    RAY_IDIOM,
    RAYTRAIN,
    RAYTRAIN_HERE,
    RAYTRAIN_TORCHRUN,
    Contender,
    Ended,
    raytrain,
)
from benchmarks.measure import (
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
from benchmarks.pieces import OVERHEAD, Assignment, Span

ROUNDS = 7
FIVE_STEPS = Span(warmup=0, timed=4, epochs=1)
TIMEOUT_S = 180.0
# In the order of time; what a launch does not have is left out, and its time is the next one's.
PHASES = {
    "parent": "the parent of the workers is started (torchrun, the raylet)",
    "controller": "Ray Train's controller process is started",
    "process": "the worker process is started",
    "task made": "the task is made: all is imported, the ranks have met",
    "model built": "data set and model are built",
    "first step": "the first step begins",
    "last step": "the fifth step begins",
    "ended": "the command has ended",
}
JOINING = "joining"
LAUNCHES: dict[str, Contender] = {
    "ddp": HAND_DDP,
    "cold": dataclasses.replace(RAYTRAIN, name="raytrain, a fresh local cluster"),
    JOINING: dataclasses.replace(RAYTRAIN, name="raytrain, joining a running cluster"),
    "here": RAYTRAIN_HERE,
    "torchrun": RAYTRAIN_TORCHRUN,
    "ray-train": RAY_IDIOM,
}


def chosen(only: str | None) -> dict[str, Contender]:
    """The launches that `--only` names and that run here, always with torchrun's; why others do not is said."""
    keys = list(LAUNCHES) if only is None else ["ddp", *only.split(",")]
    if unknown := set(keys) - set(LAUNCHES):
        sys.exit(f"--only: there is no {', '.join(sorted(unknown))}; there are {', '.join(LAUNCHES)}")
    found = {}
    for key, contender in LAUNCHES.items():
        if key not in keys:
            continue
        reason = contender.missing(contender)
        if reason is None:
            found[key] = contender
        else:
            say(f"left out: {contender.name}: {reason}")
    return found


def measure(launches: dict[str, Contender], rounds: int) -> dict[str, Any]:
    """The report: seconds to the first step, to the end, and of each phase, by round."""
    with scratch() as folder:

        def one_run(key: str) -> Callable[[], Ended]:
            run = joining_run if key == JOINING else plain_run
            return lambda: run(launches[key], folder)

        ended = interleaved(
            {key: one_run(key) for key in launches}, rounds, lambda text: say(f"launch: {text}"), needed=["ddp"]
        )
    first = {key: [run.watch["stamps"]["first step"] - run.began for run in runs] for key, runs in ended.items()}
    whole = {key: [run.ended - run.began for run in runs] for key, runs in ended.items()}
    return {
        key: {
            "name": contender.name,
            "first_step_s": first[key],
            "first_step_ratio": ratios(first[key], first["ddp"]),
            "whole_s": whole[key],
            "whole_ratio": ratios(whole[key], whole["ddp"]),
            "phases": [phases(run) for run in ended[key]],
        }
        for key, contender in launches.items()
        if key in ended
    }


def plain_run(contender: Contender, folder: Path) -> Ended:
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as own:
        return contender.run(Assignment(OVERHEAD, FIVE_STEPS, Path(own)), TIMEOUT_S)


def joining_run(contender: Contender, folder: Path) -> Ended:
    """A run on a cluster that stands only for it, so that it takes nothing from the others; its start is not timed."""
    with running_cluster(folder) as address:
        command = raytrain(2, "--num_workers", "2", "--address", address)
        return plain_run(dataclasses.replace(contender, command=command), folder)


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[str]:
    """The address of a Ray cluster of this machine, for the time of the block."""
    head = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.head"],
        cwd=folder,
        env=environment(folder),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert head.stdin is not None and head.stdout is not None
    try:
        lines = (line.decode().split() for line in head.stdout)
        address = next((words[1] for words in lines if words[:1] == ["address"]), None)
        if address is None:
            raise BenchmarkError("`python -m benchmarks.head` started no cluster")
        yield address
        head.stdin.close()
        head.wait(30.0)
    finally:
        if head.poll() is None:
            end_all(head)


def phases(run: Ended) -> dict[str, float]:
    """Seconds up to each of PHASES that this launch has, from the one before it."""
    stamps = {**run.watch["stamps"], "ended": run.ended}
    at, found = run.began, {}
    for phase in PHASES:
        if stamps.get(phase, 0.0) > at:  # else it was there before: a running cluster's raylet, the command itself
            found[phase] = stamps[phase] - at
            at = stamps[phase]
    return found


def shown(report: dict[str, Any]) -> str:
    """The report as two Markdown tables: seconds, and where they go."""
    heads = ["command of 5 steps", "to the first step: s", "x torchrun", "first round", "to the end: s", "x torchrun"]
    rows = [
        [
            launch["name"],
            spread(launch["first_step_s"]),
            spread(launch["first_step_ratio"], 2),
            f"{launch['first_step_s'][0]:.1f}",
            spread(launch["whole_s"]),
            spread(launch["whole_ratio"], 2),
        ]
        for launch in report.values()
    ]
    rounds = len(report["ddp"]["whole_s"])
    return f"launch: {rounds} rounds\n\n{table(heads, rows)}\n\n{shown_phases(list(report.values()))}"


def shown_phases(launches: Sequence[dict[str, Any]]) -> str:
    """A row for each phase: the median seconds up to it from the one before."""
    rows = []
    for phase, meaning in PHASES.items():
        seconds = [[found[phase] for found in launch["phases"] if phase in found] for launch in launches]
        rows.append([meaning, *(f"{statistics.median(values):.2f}" if values else "" for values in seconds)])
    return table(["seconds until, from the line before", *(launch["name"] for launch in launches)], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", metavar="NAME,...", help=", ".join(LAUNCHES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    args = parser.parse_args()
    found = machine()
    print(machine_line(found))
    launches = chosen(args.only)
    report = measure(launches, args.rounds)
    print(f"\n{shown(report)}")
    write_json(args.json, {"machine": found, "launch": report})
    return 0 if report.keys() == launches.keys() else 1


if __name__ == "__main__":
    sys.exit(run(main))
