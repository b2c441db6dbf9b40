"""Samples a second of raytrain's Feed against a bare DataLoader: `python -m benchmarks.feed`.

Same data set, batch size, number of loader workers and number of samples; timed from the first batch, which waits
for loader workers to start, to the last. raytrain seeds every sample by its key; the bare loader seeds nothing.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.contenders import config_of
from benchmarks.measure import interleaved, machine, machine_line, ratios, run, say, spread, table, write_json
from benchmarks.pieces import OVERHEAD, Assignment, CostlySamples, Samples, Span

ROUNDS = 7
BATCH_SIZE = 32
LOADER_WORKERS = (0, 2)
NUM_SAMPLES = {"cheap": 20_000, "costly": 2_000}


def dataset_of(kind: str, num_samples: int) -> Samples:
    """Tensors in memory, or samples that take about a millisecond of numpy each."""
    return (Samples if kind == "cheap" else CostlySamples)((64,), num_samples)


def bare_batches(dataset: Samples, workers: int) -> Iterator[Any]:
    """One epoch of a DataLoader as everyone writes it."""
    yield from DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=workers)


def feed_batches(dataset: Samples, workers: int) -> Iterator[Any]:
    """One epoch of raytrain's Feed."""
    from benchmarks.workloads import Overhead
    from raytrain.config.sections import Config
    from raytrain.data.feed import Feed
    from raytrain.engine.world import World
    from raytrain.progress import Plan, Progress

    tree = config_of(Assignment(OVERHEAD, Span(0, 1, 1), Path("unused")), ranks=1)
    cfg = Config.model_validate({**tree, "LOADER": {"WORKERS": workers}})
    plan = Plan(len(dataset), BATCH_SIZE, virtual_workers=1, accumulate=1, num_epochs=1)
    feed = Feed(Overhead(cfg), {"train": dataset}, plan, World(), cfg.LOADER, cfg.SEED, lambda epoch: False)
    try:
        feed.start(Progress())
        for step in feed.epoch_steps(Progress()):
            for keys in step.micro_batches.values():
                yield from map(feed.fetch, keys)
    finally:
        feed.close()


LOADERS = {"bare": bare_batches, "feed": feed_batches}


def samples_per_s(loader: str, kind: str, workers: int, num_samples: int) -> float:
    """Of one epoch, from its first batch on."""
    batches = LOADERS[loader](dataset_of(kind, num_samples), workers)
    first = len(next(batches)[1])
    began = time.perf_counter()
    count = sum(len(targets) for _, targets in batches)
    seconds = time.perf_counter() - began
    assert first + count == num_samples, f"{loader} gave {first + count} of {num_samples} samples"
    return count / seconds


def measure(rounds: int, share: float = 1.0, loader_workers: Sequence[int] = LOADER_WORKERS) -> list[dict[str, Any]]:
    """The report: samples/s of both by round, for each kind of sample and number of loader workers.

    share: of the usual number of samples, but two batches at least
    """
    torch.set_num_threads(1)
    cases = [(kind, workers) for kind in NUM_SAMPLES for workers in loader_workers]
    measures = {
        f"{loader} {kind} {workers}": functools.partial(
            samples_per_s, loader, kind, workers, max(2 * BATCH_SIZE, int(NUM_SAMPLES[kind] * share))
        )
        for kind, workers in cases
        for loader in LOADERS
    }
    found = interleaved(measures, rounds, lambda text: say(f"feed: {text}"))
    return [
        {
            "samples": kind,
            "loader_workers": workers,
            "bare": found[f"bare {kind} {workers}"],
            "feed": found[f"feed {kind} {workers}"],
            "ratio": ratios(found[f"feed {kind} {workers}"], found[f"bare {kind} {workers}"]),
        }
        for kind, workers in cases
    ]


def shown(report: list[dict[str, Any]]) -> str:
    """The report as a Markdown table."""
    heads = ["samples", "loader workers", "bare DataLoader: samples/s", "raytrain's Feed: samples/s", "x bare"]
    rows = [
        [
            case["samples"],
            str(case["loader_workers"]),
            spread(case["bare"], 0),
            spread(case["feed"], 0),
            spread(case["ratio"], 2),
        ]
        for case in report
    ]
    return f"feed: {len(report[0]['bare'])} rounds\n\n{table(heads, rows)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--share", type=float, default=1.0, help=f"of the samples of a round, which are {NUM_SAMPLES}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    args = parser.parse_args()
    found = machine()
    print(machine_line(found))
    report = measure(args.rounds, args.share)
    print(f"\n{shown(report)}")
    write_json(args.json, {"machine": found, "feed": report})
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
