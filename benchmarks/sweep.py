"""What a sweep costs beyond its training, and what ASHA gains: `python -m benchmarks.sweep`.

trials: 16 trials of the digits net, two at a time, by `raytrain tune`, from the command to its end; by Ray Tune as its
        documentation has it for Ray Train, of which only so many trials are run as --trials says: the time from the
        command to Tuner.fit is taken once, that of fit is scaled up to 16; and one after another in one process, bare.
asha:   sweeps by ASHA and by random search alone, from the same seed the same trials, with the same budget: of epochs,
        and of wall time. Seconds from the command to the first trial at the target; a sweep that never gets there
        counts as infinitely long.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import (
    ROOT,
    BenchmarkError,
    interleaved,
    machine,
    machine_line,
    ratios,
    run,
    run_command,
    say,
    scratch,
    spread,
    table,
    write_json,
)
from benchmarks.sweeping import TOLD, config_of

ROUNDS, SEEDS = 3, 10
CONCURRENT = 2
PER_AXIS = 4
EPOCHS = 10
IDIOM_TRIALS = 4
TIMEOUT_S = 600.0
STOPPED = 75  # the exit status of a sweep whose budget is spent
TARGET = 0.997  # 358 of 359 images: 39 of 40 sweeps got there (2026-11-29)
BUDGETS = {"epochs": 120, "seconds": 25}
PARTS = ("trials", "asha")
Measured = dict[str, Any]


def by_raytrain(folder: Path, epochs: int, per_axis: int = PER_AXIS) -> Measured:
    """The command's seconds, and those of it up to the first step of any trial."""
    path = config_of(folder, epochs, per_axis, CONCURRENT)
    command = [sys.executable, "-m", "raytrain", "tune", "--cfg_file", str(path)]
    began, ended = run_command(command, folder, TIMEOUT_S)
    journals = list(folder.glob("output/sweep/default/trial_*/journal.jsonl"))
    if len(journals) != per_axis**2:
        raise BenchmarkError(f"`raytrain tune` trained {len(journals)} of {per_axis**2} trials")
    first = min(record["time"] for path in journals for record in records(path) if record["kind"] == "step")
    return {"whole_s": ended - began, "start_s": first - began}


def by_ray(folder: Path, epochs: int, num_trials: int, per_axis: int = PER_AXIS) -> Measured:
    """Seconds of all trials, of which `num_trials` were run: see above."""
    config_of(folder, epochs, per_axis, CONCURRENT)
    words = ["ray", str(folder), str(num_trials), str(CONCURRENT)]
    began, ended = run_command([sys.executable, "-m", "benchmarks.sweeping", *words], folder, TIMEOUT_S)
    told = json.loads((folder / TOLD).read_text())
    fit_s = told["ended"] - told["began"]
    return {"whole_s": ended - began + fit_s * (per_axis**2 / num_trials - 1), "measured_s": ended - began}


def bare(folder: Path, epochs: int, per_axis: int = PER_AXIS) -> Measured:
    """Seconds of all trials one after another, divided by CONCURRENT: what a sweep without any cost would take."""
    config_of(folder, epochs, per_axis, CONCURRENT)
    run_command([sys.executable, "-m", "benchmarks.sweeping", "bare", str(folder)], folder, TIMEOUT_S)
    return {"whole_s": sum(json.loads((folder / TOLD).read_text())["trials_s"]) / CONCURRENT}


def records(path: Path) -> Iterable[dict[str, Any]]:
    return (json.loads(line) for line in path.read_text().split("\n")[:-1])


def in_folder(measure: Callable[[Path], Measured], below: Path) -> Measured:
    """What `measure` gives of an empty folder, which is removed."""
    with tempfile.TemporaryDirectory(dir=below, ignore_cleanup_errors=True) as own:
        return measure(Path(own))


def measure_trials(rounds: int, epochs: int, num_trials: int) -> dict[str, Any]:
    """The report on (a) trials a minute and (b) the sweep's seconds over the bare ones."""
    ways = {
        "raytrain": partial(by_raytrain, epochs=epochs),
        "bare": partial(bare, epochs=epochs),
    }
    if num_trials:
        ways["ray-tune"] = partial(by_ray, epochs=epochs, num_trials=num_trials)
    with scratch() as folder:
        runs = {key: partial(in_folder, way, folder) for key, way in ways.items()}
        found = interleaved(runs, rounds, lambda text: say(f"sweep: {text}"), needed=list(ways))
    whole_s = {key: [each["whole_s"] for each in found[key]] for key in ways}
    start_s = [each["start_s"] for each in found["raytrain"]]
    after_s = [whole - start for whole, start in zip(whole_s["raytrain"], start_s, strict=True)]
    return {
        "epochs": epochs,
        "idiom_trials": num_trials,
        "whole_s": whole_s,
        "per_minute": {key: [60 * PER_AXIS**2 / s for s in values] for key, values in whole_s.items()},
        "x_ray_tune": ratios(whole_s["ray-tune"], whole_s["raytrain"]) if num_trials else [],
        "x_bare": ratios(whole_s["raytrain"], whole_s["bare"]),
        "start_s": start_s,
        "x_bare_after_start": ratios(after_s, whole_s["bare"]),
    }


def shown_trials(report: dict[str, Any]) -> str:
    names = {
        "raytrain": "raytrain tune",
        "ray-tune": f"TorchTrainer in a Tune function, documented ({report['idiom_trials']} trials run)",
        "bare": f"bare, one after another, over {CONCURRENT}",
    }
    heads = [f"{PER_AXIS**2} trials of {report['epochs']} epochs, {CONCURRENT} at a time", "seconds", "trials a minute"]
    rows = [
        [name, spread(report["whole_s"][key]), spread(report["per_minute"][key])]
        for key, name in names.items()
        if key in report["whole_s"]
    ]
    lines = [f"trials a minute, x the idiom's: {spread(report['x_ray_tune'])}"] if report["x_ray_tune"] else []
    lines += [
        f"seconds, x bare: {spread(report['x_bare'], 2)}; {spread(report['x_bare_after_start'], 2)} without the "
        f"start-up, which takes {spread(report['start_s'])} s to the first step",
    ]
    return f"sweep: {len(report['start_s'])} rounds\n\n{table(heads, rows)}\n\n" + "\n".join(lines)


def searched(folder: Path, scheduler: str, seed: int, budget: dict[str, int], target: float) -> Measured:
    """One sweep of configs/sweep_clip_lr.yaml: when it got to the target, and with how many epochs of all trials."""
    path = folder / "sweep.yaml"
    own = {"SCHEDULER": scheduler, "NUM_SAMPLES": 500, "CONCURRENT": CONCURRENT, "BUDGET": budget}
    base = str(ROOT / "configs" / "sweep_clip_lr.yaml")
    path.write_text(yaml.safe_dump({"_BASE_CONFIG_": base, "SEED": seed, "OUTPUT": str(folder / "out"), "TUNE": own}))
    command = [sys.executable, "-m", "raytrain", "tune", "--cfg_file", str(path)]
    began, ended = run_command(command, folder, TIMEOUT_S, expected=(0, STOPPED))
    ledger = folder / "out" / "sweep" / "default" / "sweep.jsonl"
    results = [record for record in records(ledger) if record["kind"] == "result"]
    at = next((i for i, record in enumerate(results) if (record["value"] or 0.0) >= target), None)
    bests: list[tuple[float, float]] = []  # (seconds since the command, accuracy) whenever that was the best so far
    for record in results:
        if not bests or (record["value"] or 0.0) > bests[-1][1]:
            bests.append((record["time"] - began, record["value"] or 0.0))
    return {
        "bests": bests,
        "to_target_s": math.inf if at is None else results[at]["time"] - began,
        "to_target_epochs": math.inf if at is None else at + 1,  # one result an epoch
        "best": max(record["value"] or 0.0 for record in results),
        "epochs": len(results),
        "trials": len({record["trial"] for record in results}),
        "whole_s": ended - began,
    }


def measure_asha(seeds: int, target: float, budgets: dict[str, int]) -> dict[str, Any]:
    """The report on both schedulers, by budget; a seed is a round."""
    ways = {f"{scheduler}, {budget}": (scheduler, budget) for budget in budgets for scheduler in ("asha", "none")}
    seed_of = dict.fromkeys(ways, -1)

    def one(key: str, folder: Path) -> Measured:
        scheduler, budget = ways[key]
        limits = {budget.upper(): budgets[budget]}
        seed_of[key] += 1
        measured = partial(searched, scheduler=scheduler, seed=seed_of[key], budget=limits, target=target)
        return in_folder(measured, folder)

    with scratch() as folder:
        runs = {key: partial(one, key, folder) for key in ways}
        found = interleaved(runs, seeds, lambda text: say(f"sweep: {text}"), needed=list(ways))
    return {"target": target, "budgets": budgets, "seeds": seeds, "found": found}


def shown_asha(report: dict[str, Any]) -> str:
    heads = [f"accuracy {report['target']}", "reached", "seconds to it", "epochs to it", "best", "trials"]
    rows = []
    for key, sweeps in report["found"].items():
        scheduler, budget = key.split(", ")
        name = f"{'ASHA' if scheduler == 'asha' else 'random'}, {report['budgets'][budget]} {budget}"
        reached = sum(each["to_target_s"] < math.inf for each in sweeps)
        column = {name: [each[name] for each in sweeps] for name in sweeps[0]}
        rows.append(
            [
                name,
                f"{reached} of {len(sweeps)}",
                spread(column["to_target_s"]),
                spread(column["to_target_epochs"], 0),
                spread(column["best"], 4),
                f"{statistics.median(column['trials']):.0f}",
            ]
        )
    return f"ASHA against random: {report['seeds']} seeds\n\n{table(heads, rows)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", metavar="PART,...", help=", ".join(PARTS))
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of each of the 16 trials")
    parser.add_argument("--trials", type=int, default=IDIOM_TRIALS, help="of Ray's idiom that are run; 0: without it")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="sweeps of each kind in asha")
    parser.add_argument("--target", type=float, default=TARGET, help="accuracy in asha")
    for budget, value in BUDGETS.items():
        parser.add_argument(f"--budget_{budget}", type=int, default=value, help="of each sweep in asha")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    args = parser.parse_args()
    parts = list(PARTS) if args.only is None else args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"--only: there is no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    report: dict[str, Any] = {"machine": machine()}
    print(machine_line(report["machine"]))
    if "trials" in parts:
        report["sweep"] = measure_trials(args.rounds, args.epochs, args.trials)
        print(f"\n{shown_trials(report['sweep'])}", flush=True)
    if "asha" in parts:
        budgets = {budget: getattr(args, f"budget_{budget}") for budget in BUDGETS}
        report["asha"] = measure_asha(args.seeds, args.target, budgets)
        print(f"\n{shown_asha(report['asha'])}")
    write_json(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
