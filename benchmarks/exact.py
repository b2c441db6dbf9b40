"""What one order of addition costs: `python -m benchmarks.exact`.

Steps a second of the engine with virtual workers added by the tree, against the same engine with autograd's and the
library's own order (SCALE.EXACT: false), on the same work: both engines stand in the same processes and take turns,
some steps each, so that a machine that slows down slows both. Then the bytes that a step sends by collectives, counted
by the kernel on the loopback device of a network namespace of their own (as root), which nobody else uses.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from benchmarks.contenders import config_of
from benchmarks.measure import machine, machine_line, run, say, spread, table, write_json
from benchmarks.pieces import GRAD_NORM_CLIP, LIGHT, LR, WEIGHT_DECAY, WORKLOADS, Assignment, Samples, Span, Workload
from raytrain.config.sections import Config
from raytrain.engine.engine import Engine
from raytrain.engine.schedule import StepSettings
from raytrain.engine.world import World

# How long an engine steps before it is the other's turn, and how often: a machine whose speed varies from second to
# second spoils a few turns of many.
TURN_S = {"overhead": 0.1, "conv": 0.7, "heavy": 6.0, "light": 0.5}
ROUNDS = {"overhead": 41, "conv": 21, "heavy": 5, "light": 21}
COUNTED_STEPS = 5


class Setting(NamedTuple):
    """processes: W;   virtual_workers: V;   reduction: SCALE.REDUCTION"""

    processes: int
    virtual_workers: int
    reduction: str = "auto"

    def __str__(self) -> str:
        return f"V {self.virtual_workers} on W {self.processes}" + (
            ", by gloo" if self.reduction == "collective" else ""
        )


SETTINGS = [
    *(Setting(2, 2), Setting(2, 4), Setting(2, 8), Setting(1, 4)),
    *(Setting(2, 2, "collective"), Setting(2, 4, "collective")),
]
QUICK = [Setting(2, 2), Setting(1, 4), Setting(2, 4, "collective")]
COUNTED = [
    Setting(2, 2, "collective"),
    Setting(2, 4, "collective"),
    Setting(4, 4, "collective"),
    Setting(3, 8, "collective"),
]


class Loop:
    """An engine with its work, which takes steps."""

    def __init__(self, workload: Workload, world: World, reduction: str, is_exact: bool) -> None:
        cfg = Config.model_validate(config_of(Assignment(workload, Span(0, 1, 1), Path("unused")), ranks=world.size))
        self.model, self.world = workload.model(), world
        self.engine = Engine(self.model, cfg.OPTIMIZATION, world, reduction, is_exact)
        samples = Samples(workload.sample_shape, workload.batch_size)
        self.inputs, self.targets = samples.inputs[: workload.batch_size], samples.targets[: workload.batch_size]
        self.taken = 0

    def step(self) -> None:
        self.engine.begin_step(self.taken)
        block = self.world.block
        for v in block:
            with self.engine.virtual_worker(num_backwards=1):
                loss = cross_entropy(self.model(self.inputs), self.targets)
                self.engine.backward(loss, 1 / self.world.virtual_workers, is_last=v == block[-1])
        self.engine.step(StepSettings(LR, None, GRAD_NORM_CLIP, WEIGHT_DECAY), ())
        self.taken += 1


def loops_of(rank: int, workload: Workload, setting: Setting) -> dict[bool, Loop]:
    """By whether it is exact."""
    world = World(rank, setting.processes, setting.virtual_workers)
    return {is_exact: Loop(workload, world, setting.reduction, is_exact) for is_exact in (True, False)}


def speeds(rank: int, workload: Workload, setting: Setting, rounds: int) -> dict[bool, list[float]]:
    """Steps a second of each round, by whether the engine is exact."""
    loops = loops_of(rank, workload, setting)
    began = time.perf_counter()
    for _ in range(3):
        for loop in loops.values():
            loop.step()
    steps = max(2, int(TURN_S[workload.name] * 6 / (time.perf_counter() - began)))
    steps = agreed(steps, setting)
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for is_exact in (True, False) if number % 2 else (False, True):
            began = time.perf_counter()
            for _ in range(steps):
                loops[is_exact].step()
            found[is_exact].append(steps / (time.perf_counter() - began))
    return found


def agreed(steps: int, setting: Setting) -> int:
    """Rank 0's number."""
    given = torch.tensor(steps)
    if setting.processes > 1:
        dist.broadcast(given, src=0)
    return int(given)


def bytes_sent(rank: int, workload: Workload, setting: Setting) -> dict[bool, float]:
    """A step, by all processes together, by whether the engine is exact."""
    found = {}
    for is_exact, loop in loops_of(rank, workload, setting).items():
        loop.step()
        dist.barrier()
        before = loopback_bytes()
        dist.barrier()
        for _ in range(COUNTED_STEPS):
            loop.step()
        dist.barrier()
        found[is_exact] = (loopback_bytes() - before) / COUNTED_STEPS
        dist.barrier()
    return found


def loopback_bytes() -> int:
    """Sent on it so far, by whoever is in this network namespace."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    (counts,) = [line.partition(":")[2].split() for line in lines if line.strip().startswith("lo:")]
    return int(counts[8])


def in_processes(function: Callable[..., Any], setting: Setting, *args: Any) -> Any:
    """What `function(rank, *args)` gave on rank 0, where it runs in as many processes of one gloo group."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        here, there = context.Pipe(duplex=False)
        words = (setting.processes, f"file://{folder}/meeting", there, function, args)
        processes = [
            context.Process(target=serve, args=(rank, *words), daemon=True) for rank in range(setting.processes)
        ]
        for process in processes:
            process.start()
        there.close()
        try:
            answer = here.recv()
        except EOFError:
            raise RuntimeError(f"a process of {setting} has died") from None
        finally:
            for process in processes:
                process.join(60)
    return answer


def serve(rank: int, count: int, meeting: str, answer: Connection, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    found = function(rank, *args)
    if rank == 0:
        answer.send(found)
    if count > 1:
        dist.destroy_process_group()


def measure(
    workloads: Sequence[str], rounds: int | None, settings: Sequence[Setting] = SETTINGS
) -> list[dict[str, Any]]:
    """A row for each workload and setting."""
    rows = []
    for name in workloads:
        for setting in settings:
            say(f"{name}: {setting}")
            found = in_processes(speeds, setting, WORKLOADS[name], setting, rounds or ROUNDS[name])
            ratio = [exact / plain for exact, plain in zip(found[True], found[False], strict=True)]
            rows.append(
                {"workload": name, "setting": str(setting), "exact": found[True], "plain": found[False], "ratio": ratio}
            )
    return rows


def count() -> list[dict[str, Any]]:
    """A row for each setting whose bytes are counted; in a network namespace of their own."""
    rows = []
    for setting in COUNTED:
        say(f"bytes: {setting}")
        found = in_processes(bytes_sent, setting, dataclasses.replace(LIGHT, batch_size=8), setting)
        numbers = sum(p.numel() for p in LIGHT.model().parameters())
        rows.append(
            {
                "setting": str(setting),
                "exact": found[True],
                "plain": found[False],
                "ring": 2 * (setting.processes - 1) * 4 * numbers,
                "ratio": found[True] / found[False],
            }
        )
    return rows


def count_apart() -> list[dict[str, Any]] | None:
    """`count` where nobody else sends; None where that needs rights that we have not."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bytes.json"
        inner = f"ip link set lo up && exec {sys.executable} -m benchmarks.exact --only-count --json {out}"
        command = ["unshare", "--net", "sh", "-c", inner]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
        try:
            done = subprocess.run(command, env=environment, check=False, stdout=subprocess.DEVNULL)
        except FileNotFoundError:
            return None
        if done.returncode or not out.exists():
            return None
        rows: list[dict[str, Any]] = json.loads(out.read_text())["bytes"]
        return rows


def shown(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["workload", "setting", "exact, steps/s", "plain, steps/s", "exact / plain"]
    cells = [
        [row["workload"], row["setting"], spread(row["exact"]), spread(row["plain"]), spread(row["ratio"], 3)]
        for row in rows
    ]
    return table(heads, cells)


def bytes_shown(rows: Sequence[dict[str, Any]] | None) -> str:
    if rows is None:
        return "bytes were not counted: that needs root, unshare and ip"
    heads = ["4.9 M numbers", "exact, MB a step", "plain, MB a step", "a ring's numbers alone, MB", "exact / plain"]
    cells = [
        [row["setting"], *(f"{row[key] / 1e6:.2f}" for key in ("exact", "plain", "ring")), f"{row['ratio']:.3f}"]
        for row in rows
    ]
    return table(heads, cells)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exact", description=__doc__)
    parser.add_argument("--rounds", type=int, help=f"turns of each engine (default: {ROUNDS})")
    parser.add_argument("--workload", choices=[*WORKLOADS, "all"], default="all", help="all: overhead and conv")
    parser.add_argument("--quick", action="store_true", help="fewer settings, no counting: does all of it still run?")
    parser.add_argument("--only-count", action="store_true", help="count bytes, on the loopback device that there is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    args = parser.parse_args()
    report: dict[str, Any] = {"machine": machine()}
    print(machine_line(report["machine"]), flush=True)
    if args.only_count:
        report["bytes"] = count()
    else:
        names = ["overhead", "conv"] if args.workload == "all" else [args.workload]
        report["speed"] = measure(names, args.rounds, QUICK if args.quick else SETTINGS)
        print(shown(report["speed"]), flush=True)
        medians = [(row["workload"], row["setting"], statistics.median(row["ratio"])) for row in report["speed"]]
        for workload, setting, ratio in medians:
            if ratio < 0.97:
                print(f"below 0.97: {workload}, {setting}: {ratio:.3f}")
        report["bytes"] = None if args.quick else count_apart()
    print(bytes_shown(report["bytes"]))
    write_json(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
