"""Every GPU test and benchmark there is, in one go, within MINUTES: `make gpu`, or `python -m benchmarks.gpu`.

First the tests that need a GPU (`pytest -m gpu`). Then, on one GPU and in one process: steps a second of raytrain, a
hand-written loop, Lightning and Accelerate on small layers, a convolutional net and PointPillars, in fp32 and bf16;
raytrain eager, compiled and with CUDA graphs; how often a step waits for the GPU, and where; how long a save holds up
training; and how long after a SIGKILL the same command takes its next new step. What there is no time for is named.
With `--device cpu` all of it runs on a CPU, to see that it does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import lidar
from benchmarks.contenders import (
    ACCELERATE_HERE,
    HAND_PLAIN,
    LIGHTNING_HERE,
    RAYTRAIN_HERE,
    Contender,
    Ended,
    in_run_folder,
    raytrain,
    train_words,
)
from benchmarks.measure import (
    ROOT,
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
from benchmarks.pieces import CONV, COUNT_WAITS, HEAVY, LIDAR, LIGHT, OVERHEAD, Assignment, Span, Workload

MINUTES = 8.0
TESTS_S = 150.0
RUN_S = 120.0
SAVES_EVERY = 10
KILLED_AT = 60
LOOK_S = 0.02
SECTIONS = ("speed", "modes", "waits", "saves", "recovery")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much work there is: on a GPU, and to try all of it. loaders: loader workers of the LiDAR task."""

    rounds: int
    spans: dict[str, Span]
    large: Workload
    loaders: int


FULL = Scale(
    2, {"overhead": Span(200, 3000), "conv": Span(50, 600), "lidar": Span(20, 100), "heavy": Span(10, 50)}, HEAVY, 4
)
QUICK = Scale(1, {"overhead": Span(3, 12), "conv": Span(1, 2), "lidar": Span(1, 2), "light": Span(10, 31)}, LIGHT, 0)


class Session:
    """What is measured on one device, and when there is no more time for more.

    skipped: what there was no time for
    """

    def __init__(self, device: str, scale: Scale, minutes: float, folder: Path) -> None:
        self.device, self.scale, self.folder = device, scale, folder
        self._ends = time.monotonic() + 60 * minutes
        self.skipped: list[str] = []
        self.failed: list[str] = []

    def has_time(self, what: str) -> bool:
        if time.monotonic() < self._ends:
            return True
        self.skipped.append(what)
        return False

    def run(self, contender: Contender, workload: Workload, precision: str = "fp32", **env: str) -> Ended:
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as own, added(env):
            span = self.scale.spans[workload.name]
            return contender.run(Assignment(workload, span, Path(own), self.device, precision), RUN_S)

    def rows(self, what: str, measure: Callable[[], list[Row]]) -> list[Row]:
        """What `measure` gives; nothing, and a word, if it fails."""
        if not self.has_time(what):
            return []
        say(what)
        try:
            return measure()
        except BenchmarkError as error:
            say(f"FAILED: {what}: {error}")
            self.failed.append(f"{what}: {str(error).splitlines()[0]}")
            return []


@contextlib.contextmanager
def added(env: dict[str, str]) -> Iterator[None]:
    """These variables, for the commands that are started in the block."""
    os.environ.update(env)
    try:
        yield
    finally:
        for name in env:
            del os.environ[name]


def tests() -> Row:
    """How `pytest -m gpu` ended: its closing line, and which failed."""
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--timeout", "120"]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=TESTS_S)
        printed = done.stdout
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"").decode() + f"\nnot done after {TESTS_S:.0f} s\n"
    lines = printed.strip().splitlines() or ["nothing was printed"]
    return {"closing line": lines[-1], "failed": re.findall(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)}


def speeds(session: Session, workload: Workload, precision: str) -> list[Row]:
    """Steps a second of each loop that is installed, and its share of the hand-written one's."""
    found = lidar.contenders(session.scale.loaders) if workload is LIDAR else general()
    runs = {each.key: functools.partial(session.run, each, workload, precision) for each in found}
    ended = interleaved(runs, session.scale.rounds, lambda text: say(f"  {text}"), [found[0].key])
    reference = [one.steps_per_s for one in ended[found[0].key]]
    rows = []
    for each in found:
        if each.key in ended:
            steps = [one.steps_per_s for one in ended[each.key]]
            row = {"workload": workload.name, "precision": precision, "loop": each.name, "steps_per_s": steps}
            rows.append(
                {**row, "ratio": ratios(steps, reference), "peak_bytes": ended[each.key][0].watch["peak_bytes"]}
            )
    return rows


def general() -> list[Contender]:
    """The loops that train any net, the hand-written one first."""
    found = []
    for contender in (HAND_PLAIN, RAYTRAIN_HERE, LIGHTNING_HERE, ACCELERATE_HERE):
        reason = contender.missing(contender)
        if reason is None:
            found.append(contender)
        else:
            say(f"left out: {contender.name}: {reason}")
    return found


MODES = {
    "eager": [],
    "compiled": ["OPTIMIZATION.COMPILE", "true"],
    "CUDA graphs": ["OPTIMIZATION.COMPILE", "true", "OPTIMIZATION.CUDA_GRAPHS", "true"],
}


def modes(session: Session, workload: Workload) -> list[Row]:
    """Steps a second of raytrain in each mode."""
    rows = []
    for mode, words in MODES.items():
        if mode == "CUDA graphs" and session.device == "cpu":
            continue
        flags = ["--num_workers", "0", *(["--set", *words] if words else [])]
        contender = Contender("raytrain-here", f"raytrain, {mode}", 1, raytrain(1, *flags), in_run_folder)
        steps = session.run(contender, workload).steps_per_s
        rows.append({"workload": workload.name, "mode": mode, "steps_per_s": [steps]})
    return rows


def waits(session: Session) -> list[Row]:
    """How often a step waits for the GPU, and in which lines."""
    rows = []
    for contender in (HAND_PLAIN, RAYTRAIN_HERE):
        watch = session.run(contender, CONV, **{COUNT_WAITS: "1"}).watch
        rows.append({"loop": contender.name, "waits_per_step": watch["waits_per_step"], "where": watch["waits"]})
    return rows


def saves(session: Session) -> list[Row]:
    """Seconds that training stands still for a save of weights and moments, and those until it is on the disk."""
    words = ["CHECKPOINT.EVERY_STEPS", str(SAVES_EVERY), "CHECKPOINT.KEEP_LAST", "1"]
    command = raytrain(1, "--num_workers", "0", "--set", *words)
    found: list[Row] = []

    def noted(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
        found.extend(record for record in journal_of(folder) if record["kind"] == "checkpoint")
        return in_run_folder(folder)

    session.run(Contender("raytrain-here", "raytrain", 1, command, noted), session.scale.large)
    numbers = sum(p.numel() for p in session.scale.large.model().parameters())
    stalls, seconds = ([record[key] for record in found[1:]] for key in ("stall_s", "save_s"))
    return [{"MB": 12 * numbers / 1e6, "stall_s": stalls, "save_s": seconds}] if stalls else []


def recovery(session: Session) -> list[Row]:
    """Seconds from SIGKILL to the next new step of the same command, and the steps that were taken again."""
    with tempfile.TemporaryDirectory(dir=session.folder, ignore_cleanup_errors=True) as own:
        folder = Path(own)
        span = Span(1, 100_000)
        assignment = Assignment(OVERHEAD, span, folder, session.device)
        words = [sys.executable, "-m", "raytrain", *train_words(assignment, ranks=1), "--num_workers", "0"]
        words += ["--set", "CHECKPOINT.EVERY_STEPS", str(SAVES_EVERY), "LOG.EVERY", "1"]
        before = until(folder, words, lambda step: step >= KILLED_AT)
        killed = time.time()
        after = until(folder, words, lambda step: step > before)
        resumed = [record for record in journal_of(folder) if record["kind"] == "run"][-1]
        return [{"seconds": time.time() - killed, "steps_again": before - int(resumed["step"]), "to": after}]


def until(folder: Path, words: Sequence[str], reached: Callable[[int], bool]) -> int:
    """Starts a command, and kills it once the last step of its journal is one that was waited for: that step."""
    with open(folder / "printed.txt", "ab") as file:
        process = subprocess.Popen(
            words, cwd=folder, env=environment(folder), stdout=file, stderr=file, start_new_session=True
        )
    try:
        ends = time.monotonic() + RUN_S
        while time.monotonic() < ends and process.poll() is None:
            steps = [record["step"] for record in journal_of(folder) if record["kind"] == "step"]
            if steps and reached(steps[-1]):
                return int(steps[-1])
            time.sleep(LOOK_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        end_all(process)
    raise BenchmarkError(f"`{' '.join(words)}` did not come so far:\n{(folder / 'printed.txt').read_text()[-2000:]}")


def journal_of(folder: Path) -> list[Row]:
    lines = [line for path in (folder / "output").rglob("journal.jsonl") for line in path.read_text().splitlines()]
    records = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # the last one, as it is written
            records.append(json.loads(line))
    return records


def measured(session: Session, only: Sequence[str]) -> dict[str, list[Row]]:
    """All sections that are wanted, the most wanted first."""
    jobs: list[tuple[str, str, Callable[[], list[Row]]]] = [
        ("speed", f"{workload.name}, fp32", functools.partial(speeds, session, workload, "fp32"))
        for workload in (OVERHEAD, CONV, LIDAR)
    ]
    jobs += [("waits", "for the GPU", functools.partial(waits, session))]
    jobs += [("saves", "of the large net", functools.partial(saves, session))]
    jobs += [("recovery", "after a SIGKILL", functools.partial(recovery, session))]
    jobs += [("modes", OVERHEAD.name, functools.partial(modes, session, OVERHEAD))]
    jobs += [
        ("speed", f"{workload.name}, bf16", functools.partial(speeds, session, workload, "bf16"))
        for workload in (OVERHEAD, CONV, LIDAR)
    ]
    jobs += [("modes", CONV.name, functools.partial(modes, session, CONV))]
    found: dict[str, list[Row]] = {section: [] for section in SECTIONS}
    for section, what, measure in jobs:
        if section in only:
            found[section] += session.rows(f"{section}: {what}", measure)
    return found


def shown(found: dict[str, list[Row]]) -> str:
    """The tables."""
    texts = []
    if found["speed"]:
        rows = [
            [row["workload"], row["precision"], row["loop"], spread(row["steps_per_s"]), spread(row["ratio"], 2)]
            for row in found["speed"]
        ]
        texts.append(table(["workload", "precision", "loop", "steps/s", "x hand-written"], rows))
    if found["modes"]:
        rows = [[row["workload"], row["mode"], spread(row["steps_per_s"])] for row in found["modes"]]
        texts.append(table(["workload", "mode", "steps/s"], rows))
    if found["waits"]:
        rows = [
            [row["loop"], f"{row['waits_per_step']:.2f}", ", ".join(row["where"]) or "nowhere"]
            for row in found["waits"]
        ]
        texts.append(table(["loop", "waits for the GPU a step", "where"], rows))
    for row in found["saves"]:
        texts.append(
            f"a save of {row['MB']:.0f} MB holds training up for {1000 * statistics.median(row['stall_s']):.1f} ms, "
            f"and is on the disk after {statistics.median(row['save_s']):.2f} s ({len(row['stall_s'])} saves)"
        )
    for row in found["recovery"]:
        texts.append(
            f"{row['seconds']:.1f} s from SIGKILL to the next new step of the same command, {row['steps_again']} steps "
            "taken again"
        )
    return "\n\n".join(texts)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--quick", action="store_true", help="a few steps of each: does all of it still run?")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="measure only these")
    parser.add_argument("--no-tests", action="store_true", help="only measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found there")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        say("this torch sees no GPU; `--device cpu --quick` tries all of it without one")
        return 2
    report: dict[str, Any] = {"machine": machine(), "device": args.device}
    print(machine_line(report["machine"]))
    if args.device == "cuda":
        report["gpu"] = torch.cuda.get_device_name()
        print(report["gpu"])
    with scratch() as folder:
        session = Session(args.device, QUICK if args.quick else FULL, args.minutes, folder)
        if not args.no_tests:
            report["tests"] = tests()
            print("\n".join(["", report["tests"]["closing line"], *report["tests"]["failed"]]), flush=True)
            write_json(args.json, report)
        report |= measured(session, args.only)
    print(f"\n{shown({section: report[section] for section in SECTIONS})}")
    report |= {"skipped": session.skipped, "failed": session.failed}
    for what in session.skipped:
        print(f"no time was left for {what}")
    for what in session.failed:
        print(f"FAILED: {what}")
    write_json(args.json, report)
    return 1 if session.failed or report.get("tests", {}).get("failed") else 0


if __name__ == "__main__":
    sys.exit(run(main))
