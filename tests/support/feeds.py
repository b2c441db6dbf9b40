"""Feeds over samples that tell what was drawn for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from tasks_for_units import Draws, DrawTask

from raytrain.data.feed import Feed
from raytrain.data.loader import BatchKey
from raytrain.engine.world import World
from raytrain.progress import Plan, Progress
from raytrain.task import Task

START = Progress()
PLAN = Plan(num_samples=22, batch_size=3, virtual_workers=2, accumulate=1, num_epochs=3)


@contextlib.contextmanager
def feed_of(
    workers: int = 0,
    world: World | None = None,
    datasets: dict[str, Any] | None = None,
    plan: Plan = PLAN,
    task: Task | None = None,
) -> Iterator[Feed]:
    """A feed over Draws that evaluates after the epochs 2 and 3."""
    loader_cfg = SimpleNamespace(WORKERS=workers, PREFETCH=2, SHUFFLE=True)
    datasets = datasets or {"train": Draws(22), "val": Draws(7)}
    world = world or World(virtual_workers=plan.virtual_workers)
    task = task or DrawTask(None)  # type: ignore[arg-type]
    feed = Feed(task, datasets, plan, world, loader_cfg, 5, lambda epoch: epoch in (2, 3))
    with contextlib.closing(feed):
        yield feed


def whole_run(feed: Feed, progress: Progress = START) -> Iterator[tuple[BatchKey, dict[str, Any]]]:
    """Every batch of the run from `progress` on, asked for as the loop does."""
    feed.start(progress)
    while not feed.plan.finished(progress):
        for step in feed.epoch_steps(progress):
            for keys in step.micro_batches.values():
                yield from ((key, feed.fetch(key)) for key in keys)
            progress = feed.plan.advanced(progress, step.consumed)
        if feed.evaluates_after(progress.epoch):
            yield from ((key, feed.fetch(key)) for key in feed.validation_keys(progress))
