"""Steps a second of each loop on the same work: `python -m benchmarks.loop`.

Every loop trains the same batches in the same order from the same weights, with one thread a process, and
is timed by the same watch on rank 0: from the start of step WARMUP to the start of step WARMUP + STEPS.
Start-up, evaluation and checkpoints lie outside. raytrain logs as it does by default, the others not at all.
That all did the same work is checked: what a loop ends with must be the hand-written loop's to rounding.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS, HAND_DDP, HAND_PLAIN, Contender, Ended
from benchmarks.measure import interleaved, machine, machine_line, ratios, run, say, scratch, spread, table, write_json
from benchmarks.pieces import WORKLOADS, Assignment, Span, Workload

ROUNDS = 7
STEPS = {"overhead": 2000, "conv": 60}
WARMUP = {"overhead": 100, "conv": 10}
# Largest difference of a tensor's numbers, as a share of its largest number. Sums in another order differ by 1e-7
# in float32, and AdamW carries that on where a gradient is nearly 0, since it divides by the gradient's own size:
# initial weights that are 6e-8 apart end 2e-5 apart after 70 steps of the conv net.
TOLERANCE = {"overhead": 1e-5, "conv": 1e-4}
TIMEOUT_S = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, help=f"timed steps of a run (default: {STEPS})")
    parser.add_argument("--workload", choices=[*STEPS, "all"], default="all")


def chosen(only: str | None) -> list[Contender]:
    """The contenders that `--only` names and that run here, each with its reference; why others do not is said."""
    keys = [contender.key for contender in CONTENDERS] if only is None else only.split(",")
    unknown = set(keys) - {contender.key for contender in CONTENDERS}
    if unknown:
        known = ", ".join(contender.key for contender in CONTENDERS)
        sys.exit(f"--only: there is no {', '.join(sorted(unknown))}; there are {known}")
    wanted = [contender for contender in CONTENDERS if contender.key in keys]
    needed = [reference_of(contender) for contender in wanted]
    found = []
    for contender in CONTENDERS:
        if contender not in (*wanted, *needed):
            continue
        reason = contender.missing(contender)
        if reason is None:
            found.append(contender)
        else:
            say(f"left out: {contender.name}: {reason}")
    return found


def reference_of(contender: Contender) -> Contender:
    """The hand-written loop on as many ranks."""
    return HAND_PLAIN if contender.ranks == 1 else HAND_DDP


def measure(workload: Workload, contenders: Sequence[Contender], span: Span, rounds: int) -> dict[str, Any]:
    """The report of one workload: every round of every loop, and how far its weights are from the reference's."""
    with scratch() as folder:
        runs = {
            contender.key: functools.partial(one_run, contender, workload, span, folder) for contender in contenders
        }
        needed = (HAND_DDP.key, HAND_PLAIN.key)
        ended = interleaved(runs, rounds, lambda text: say(f"{workload.name}: {text}"), needed)
    return {
        "workload": workload.name,
        "warmup": span.warmup,
        "steps": span.timed,
        "tolerance": TOLERANCE[workload.name],
        "failed": sorted(runs.keys() - ended.keys()),
        "loops": {
            contender.key: summary(contender, ended[contender.key], ended[reference_of(contender).key])
            for contender in contenders
            if contender.key in ended
        },
    }


def one_run(contender: Contender, workload: Workload, span: Span, folder: Path) -> Ended:
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as own:
        return contender.run(Assignment(workload, span, Path(own)), TIMEOUT_S)


def summary(contender: Contender, ended: Sequence[Ended], reference: Sequence[Ended]) -> dict[str, Any]:
    """What is written down of one loop. Differences are the largest of all rounds, to the reference's first."""
    speeds = [run.steps_per_s for run in ended]
    return {
        "name": contender.name,
        "reference": reference_of(contender).key,
        "steps_per_s": speeds,
        "ratio": ratios(speeds, [run.steps_per_s for run in reference]),
        "final_loss": [run.loss for run in ended],
        "loss_difference": max(abs(run.loss - reference[0].loss) / abs(reference[0].loss) for run in ended),
        "weights_difference": max(difference(run.weights, reference[0].weights) for run in ended),
        "sha256": sorted({run.sha256 for run in ended}),
        "bit_equal": all(run.sha256 == reference[0].sha256 for run in ended),
    }


def difference(weights: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """The largest difference of any number, as a share of its tensor's largest; inf for other tensors or NaN."""
    if weights.keys() != reference.keys():
        return float("inf")
    shares = [0.0]
    for name, expected in reference.items():
        apart = (weights[name].double() - expected.double()).abs().max()
        shares.append(float(apart / expected.double().abs().max().clamp_min(1e-30)))
    return max(share if share == share else float("inf") for share in shares)


def failures(report: dict[str, Any]) -> list[str]:
    """A line for each loop that failed, or that ended with other weights or another loss than the hand-written one."""
    found = [f"{report['workload']}: {key} failed" for key in report["failed"]]
    for loop in report["loops"].values():
        for what in ("weights", "loss"):
            apart, most = loop[f"{what}_difference"], report["tolerance"]
            if not apart <= most:
                found.append(
                    f"{report['workload']}: {loop['name']}: {what} differ by {apart:.1e}, more than {most:.0e}"
                )
    return found


def shown(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    rows = []
    for loop in report["loops"].values():
        reference = report["loops"][loop["reference"]]
        rows.append(
            [
                loop["name"],
                spread(loop["steps_per_s"]),
                spread(loop["ratio"], 2) if loop is not reference else "1",
                f"{statistics.median(loop['final_loss']):.6f}",
                "bit equal" if loop["bit_equal"] else f"{loop['weights_difference']:.0e} apart",
                " ".join(digest[:10] for digest in loop["sha256"]),
            ]
        )
    heads = ["loop", "steps/s: median (range)", "x hand-written", "last loss", "weights", "sha256"]
    rounds = len(next(iter(report["loops"].values()))["steps_per_s"])
    title = f"{report['workload']}: {report['steps']} steps after {report['warmup']}, {rounds} rounds"
    return f"{title}\n\n{table(heads, rows)}"


def measure_all(args: argparse.Namespace, show: Callable[[str], None]) -> tuple[list[dict[str, Any]], list[str]]:
    """The report of each workload asked for, shown as soon as it is there; and what was wrong with the weights."""
    contenders = chosen(args.only)
    names = list(STEPS) if args.workload == "all" else [args.workload]
    reports = []
    for name in names:
        steps = args.steps or STEPS[name]
        span = Span(min(WARMUP[name], steps), steps)
        reports.append(measure(WORKLOADS[name], contenders, span, args.rounds))
        show(shown(reports[-1]))
    return reports, [line for report in reports for line in failures(report)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", metavar="NAME,...", help=", ".join(contender.key for contender in CONTENDERS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    add_arguments(parser)
    args = parser.parse_args()
    found = machine()
    print(machine_line(found))
    reports, wrong = measure_all(args, lambda text: print(f"\n{text}", flush=True))
    write_json(args.json, {"machine": found, "loop": reports})
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run(main))
