"""What saving costs: `python -m benchmarks.checkpoint`.

Every way saves model and AdamW's state (605 MB) of the same training every EVERY steps, to the same disk. Timed are
the seconds that the loop stands still at each save, and the steps a second, twice: while training goes on (from the
start of step WARMUP to the start of step WARMUP + timed), and from there until the last save is on the disk. The
first save, which sets things up, lies before and is shown apart. All that was written before is on the disk when a
run begins, and its files are gone; what remains of the page cache is the system's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.contenders import CONFIG, Contender, config_of, in_run_folder, kept, script, under_torchrun
from benchmarks.loop import difference
from benchmarks.measure import interleaved, machine, machine_line, ratios, run, say, scratch, spread, table, write_json
from benchmarks.pieces import HEAVY, LIGHT, Assignment, Span, Workload
from benchmarks.savers import EVERY, SAVES

ROUNDS = 3
TIMED_SAVES = 3
TIMEOUT_S = 180.0
TOLERANCE = 1e-4  # of the weights, as in loop.py: 25 steps of AdamW carry rounding that far
# Freed memory stays with each process. glibc changes its mind about that by what was freed before: a loop without
# saves then took 50,000 page faults a step, 7 % of its time, that the same loop with saves did not.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
NO_SAVES: dict[str, Any] = {"EVERY_EPOCHS": None, "EVERY_SECONDS": None, "SNAPSHOT_EVERY": None}
SAVES_OFTEN: dict[str, Any] = {"EVERY_EPOCHS": None, "EVERY_SECONDS": None, "EVERY_STEPS": EVERY, "KEEP_LAST": 2}


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to save. without: key of the same loop without saves; saves: of a run's folder."""

    loop: Contender
    without: str
    saves: Callable[[Path], Saves]


@dataclasses.dataclass(frozen=True)
class Saves:
    """stalls: seconds that the loop stood still at each save that reached the disk; on_disk: time.time() then."""

    stalls: list[float]
    on_disk: float


@dataclasses.dataclass(frozen=True)
class Round:
    """What one run gave."""

    stalls: list[float]
    training: float  # steps a second
    whole: float  # steps a second
    apart: float  # of the weights, from those of the loop without saves


def ways(ranks: int) -> list[Way]:
    """Those that are compared; the first is the reference."""
    plain = script if ranks == 1 else under_torchrun

    def by_hand(key: str, name: str) -> Way:
        return Way(Contender(key, name, ranks, plain("savers", key), kept), "none", noted)

    def by_ray(key: str, name: str, mode: str) -> Way:
        return Way(Contender(key, name, ranks, script("ray_savers", str(ranks), mode), kept), "none", uploaded)

    def by_raytrain(key: str, name: str, policy: dict[str, Any], workers: int) -> Way:
        command = functools.partial(raytrain_words, policy, workers)
        return Way(Contender(key, name, ranks, command, in_run_folder), "raytrain-none", journalled)

    found = [
        by_hand("none", "no saves"),
        by_hand("torch-save", "torch.save, fsync, rename"),
        by_hand("async-save", "torch.distributed.checkpoint.async_save"),
        by_ray("ray", "Ray Train, report", "SYNC"),
        by_ray("ray-async", "Ray Train, report, ASYNC", "ASYNC"),
        by_raytrain("raytrain-none", "raytrain, no saves", NO_SAVES, 0 if ranks == 1 else ranks),
        by_raytrain("raytrain-ray", "raytrain under Ray", SAVES_OFTEN, ranks),
    ]
    here = by_raytrain("raytrain", "raytrain, --num_workers 0", SAVES_OFTEN, 0)
    return [*found, here] if ranks == 1 else found


def raytrain_words(policy: dict[str, Any], workers: int, assignment: Assignment) -> list[str]:
    config = config_of(assignment, max(workers, 1)) | {"CHECKPOINT": policy}
    path = assignment.folder / CONFIG
    path.write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "raytrain", "train", "--cfg_file", str(path), "--num_workers", str(workers)]


def noted(folder: Path) -> Saves:
    """What savers.py has written."""
    return Saves(**json.loads((folder / SAVES).read_text()))


def uploaded(folder: Path) -> Saves:
    """Of Ray, when its last file was copied: what it asks of the disk is left to the system."""
    files = (folder / "ray_results").rglob("checkpoint_*/*")
    return Saves(noted(folder).stalls, max(path.stat().st_mtime for path in files))


def journalled(folder: Path) -> Saves:
    """What raytrain's journal says. A checkpoint's manifest is the last of it to be written."""
    (journal,) = (folder / "output").rglob("journal.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    saves = [record for record in records if record["kind"] == "checkpoint"]
    manifests = (journal.parent / "ckpt").glob("*/manifest.json")
    return Saves([save["stall_s"] for save in saves], max(path.stat().st_mtime for path in manifests))


def one_run(way: Way, workload: Workload, span: Span, folder: Path, reference: dict[str, torch.Tensor]) -> Round:
    """reference: weights, taken from the first run"""
    os.sync()
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as own:
        ended = way.loop.run(Assignment(workload, span, Path(own)), TIMEOUT_S)
        saves = way.saves(Path(own))
    if not reference:
        reference.update(ended.weights)
    began = ended.watch["stamps"]["last step"] - ended.watch["seconds"]
    whole = (span.timed + span.after) / (saves.on_disk - began)
    say(
        f"  {ended.steps_per_s:.3f} steps/s, {whole:.3f} until on the disk, stalls"
        f" {' '.join(f'{stall:.3f}' for stall in saves.stalls)}"
    )
    return Round(saves.stalls, ended.steps_per_s, whole, difference(ended.weights, reference))


def measure(chosen: Sequence[Way], workload: Workload, span: Span, rounds: int) -> dict[str, Any]:
    reference: dict[str, torch.Tensor] = {}
    with scratch() as folder:
        runs = {way.loop.key: functools.partial(one_run, way, workload, span, folder, reference) for way in chosen}
        needed = [way.loop.key for way in chosen if way.loop.key in ("none", "raytrain-none", "torch-save")]
        found = interleaved(runs, rounds, say, needed)
    return {
        "workload": workload.name,
        "every": EVERY,
        "warmup": span.warmup,
        "timed": span.timed,
        "steps": span.steps_per_epoch,
        "failed": sorted(runs.keys() - found.keys()),
        "ways": {way.loop.key: summary(way, found) for way in chosen if way.loop.key in found},
    }


def summary(way: Way, found: dict[str, list[Round]]) -> dict[str, Any]:
    """What is written down of one way. x_...: by round, against torch.save's loop, or its own without saves."""
    rounds = found[way.loop.key]
    training, whole = [each.training for each in rounds], [each.whole for each in rounds]
    return {
        "name": way.loop.name,
        "first_stall_s": [each.stalls[0] for each in rounds if len(each.stalls) > 1],
        "saved": [len(each.stalls) for each in rounds],
        "stall_s": [stall for each in rounds for stall in each.stalls[1:]],
        "training_steps_per_s": training,
        "whole_steps_per_s": whole,
        "x_torch_save": ratios(whole, [each.whole for each in found["torch-save"]]),
        "x_no_saves": ratios(training, [each.training for each in found[way.without]]),
        "weights_difference": max(each.apart for each in rounds),
    }


def shown(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    rows = []
    for way in report["ways"].values():
        saves = bool(way["stall_s"])
        rows.append(
            [
                way["name"],
                f"{statistics.median(way['stall_s']):.3f}, {max(way['stall_s']):.3f}" if saves else "",
                f"{statistics.median(way['first_stall_s']):.3f}" if saves else "",
                f"{min(way['saved'])} of {report['steps'] // report['every']}" if saves else "",
                spread(way["training_steps_per_s"], 3),
                spread(way["x_no_saves"], 3) if saves else "1",
                spread(way["whole_steps_per_s"], 3),
                spread(way["x_torch_save"], 2) if saves else "",
                f"{way['weights_difference']:.0e}",
            ]
        )
    heads = ["saving", "stall s: median, most", "first", "saved", "steps/s training", "x no saves"]
    heads += ["steps/s until on the disk", "x torch.save", "weights apart"]
    rounds = len(next(iter(report["ways"].values()))["training_steps_per_s"])
    title = f"{report['workload']}: {report['steps']} steps, a save every {report['every']}, {rounds} rounds"
    return f"{title}\n\n{table(heads, rows)}"


def failures(report: dict[str, Any]) -> list[str]:
    """A line for each way that failed, or with which training ended elsewhere."""
    found = [f"{key} failed" for key in report["failed"]]
    for way in report["ways"].values():
        if not way["weights_difference"] <= TOLERANCE:
            found.append(f"{way['name']}: weights differ by {way['weights_difference']:.1e}, more than {TOLERANCE:.0e}")
    return found


def chosen(only: str | None, ranks: int) -> list[Way]:
    """The ways that `--only` names, and those that they are compared with."""
    found = ways(ranks)
    keys = {way.loop.key for way in found}
    wanted = keys if only is None else set(only.split(","))
    if wanted - keys:
        sys.exit(f"--only: there is no {', '.join(sorted(wanted - keys))}; there are {', '.join(sorted(keys))}")
    wanted |= {way.without for way in found if way.loop.key in wanted} | {"none", "torch-save"}
    return [way for way in found if way.loop.key in wanted]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--saves", type=int, default=TIMED_SAVES, help="timed saves of a run, of two more")
    parser.add_argument("--ranks", type=int, choices=[1, 2], default=1, help="processes that train")
    parser.add_argument("--light", action="store_true", help="a tenth of the model: does all of it still run?")
    parser.add_argument("--only", metavar="NAME,...", help=", ".join(way.loop.key for way in ways(1)))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    args = parser.parse_args()
    os.environ |= MALLOC
    found = machine()
    print(machine_line(found))
    span = Span(EVERY, EVERY * args.saves, epochs=1, after=EVERY)
    report = measure(chosen(args.only, args.ranks), LIGHT if args.light else HEAVY, span, args.rounds)
    print(f"\n{shown(report)}", flush=True)
    wrong = failures(report)
    write_json(args.json, {"machine": found, "ranks": args.ranks, "checkpoint": report})
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run(main))
