"""The ways in which a proof takes the same steps; light, since the command line names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytrain.config.sections import Config

STRAIGHT = "straight"
AGAIN, LOADERS, RESUMED, HASH_SEED, WORKERS = "again", "loaders", "resumed", "hash_seed", "workers"
KINDS = (AGAIN, LOADERS, RESUMED, HASH_SEED, WORKERS)  # besides straight
MOST_WORKERS = 3
LOADER_WORKERS = 2


@dataclasses.dataclass(frozen=True)
class Way:
    """How the steps are taken in one trial.

    loaders: loader workers;   workers: worker processes
    """

    kind: str
    title: str
    loaders: int = 0
    workers: int = 1


def virtual_workers_of(cfg: Config) -> tuple[int, list[str]]:
    """Of all trials, and what is to be told of that: with one alone, numbers of processes could not be compared."""
    wished = cfg.SCALE.VIRTUAL_WORKERS or max(1, cfg.SCALE.NUM_WORKERS or 1)
    if wished > 1:
        return wished, []
    return 2, ["the config has 1 virtual worker; 2 are taken, so that numbers of worker processes can be compared"]


def ways_of(virtual_workers: int, only: Sequence[str]) -> list[Way]:
    """Those of the kinds `only`; all, if it is empty."""
    ways = [
        Way(AGAIN, "once more"),
        Way(HASH_SEED, "under another hash seed"),
        Way(RESUMED, "killed half-way, and resumed"),
        Way(LOADERS, f"with {LOADER_WORKERS} loader workers", loaders=LOADER_WORKERS),
    ]
    counts = range(2, min(virtual_workers, MOST_WORKERS) + 1)
    ways += [Way(WORKERS, f"on {each} worker processes", workers=each) for each in counts]
    return [way for way in ways if not only or way.kind in only]


def why_not(way: Way, cfg: Config, straight: Mapping[str, Any]) -> str:
    """Why a way is not tried, as is known by the trace of going straight; "" if it is."""
    if way.kind == LOADERS and straight["own_of_datasets"]:
        return "the data set has a state (state_dict), which goes with LOADER.WORKERS: 0 alone"
    if way.kind == RESUMED and straight["half"] == 0:
        return "there is no half of one step"
    if way.kind == WORKERS and cfg.OPTIMIZATION.SYNC_BN:
        return "OPTIMIZATION.SYNC_BN needs a worker process for each virtual worker"
    if way.kind == WORKERS and cfg.SCALE.EXACT is False:
        return "SCALE.EXACT is false, so it agrees to rounding only"
    if way.workers > 1 and straight["device"] == "cuda" and straight["gpus"] < way.workers:
        return f"GPUs here: {straight['gpus']} (--no_gpu tries it on the CPU)"
    return ""
