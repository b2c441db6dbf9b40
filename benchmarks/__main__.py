"""Everything, in one command: `python -m benchmarks --json out.json`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import feed, launch, loop, recovery
from benchmarks.measure import machine, machine_line, run, write_json


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round of a few steps: does all of it still run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    loop.add_arguments(parser)
    parser.set_defaults(only=None)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps = 1, args.steps or 8
    report: dict[str, Any] = {"machine": machine()}
    show(machine_line(report["machine"]))
    report["loop"], wrong = loop.measure_all(args, show)
    launches = launch.chosen(None)
    report["launch"] = launch.measure(launches, args.rounds)
    wrong += [f"launch: {key} failed" for key in launches if key not in report["launch"]]
    show(launch.shown(report["launch"]))
    report["feed"] = feed.measure(args.rounds, share=0.1 if args.quick else 1.0)
    show(feed.shown(report["feed"]))
    report["recovery"] = recovery.measure(list(recovery.CONTENDERS), args.rounds)
    wrong += [f"recovery: {key} failed" for key in recovery.CONTENDERS if key not in report["recovery"]]
    show(recovery.shown(report["recovery"]))
    write_json(args.json, report)
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return 1 if wrong else 0


def show(text: str) -> None:
    print(f"{text}\n", flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
