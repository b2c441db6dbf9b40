"""The space of a sweep: what its trials differ in, and the config of each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from raytrain.config.distributions import Choices, Distribution, distribution
from raytrain.config.load import with_values
from raytrain.config.sections import Config, Tune
from raytrain.errors import ConfigError

Params = dict[str, Any]  # dotted key -> value


@dataclasses.dataclass(frozen=True)
class Space:
    """Dotted key -> what its values are drawn from, in the order of the config."""

    entries: dict[str, Distribution]

    @staticmethod
    def of(tune: Tune) -> Space:
        return Space({key: distribution(entry) for key, entry in tune.SPACE.items()})

    @property
    def is_grid(self) -> bool:
        """Whether nothing is left to chance: a second trial of a combination would be the first one again."""
        return all(isinstance(drawn, Choices) and drawn.crossed for drawn in self.entries.values())

    def sample(self, rng: np.random.Generator) -> Params:
        """A value of each key."""
        return {key: drawn.sample(rng) for key, drawn in self.entries.items()}

    def of_grids(self) -> Combinations:
        """Of the grids alone; one, of nothing, without a grid."""
        return Combinations({k: d for k, d in self.entries.items() if isinstance(d, Choices) and d.crossed})

    def of_lists(self) -> Combinations:
        """Of a space of lists."""
        return Combinations({k: d for k, d in self.entries.items() if isinstance(d, Choices)})


@dataclasses.dataclass(frozen=True)
class Combinations:
    """Each value of each list with each of the others', the last list's changing fastest."""

    lists: dict[str, Choices]

    @property
    def size(self) -> int:
        return math.prod(options.size for options in self.lists.values())

    def at(self, index: int) -> Params:
        values = []
        for options in reversed(self.lists.values()):
            index, place = divmod(index, options.size)
            values.append(options.at(place))
        return dict(zip(self.lists, reversed(values), strict=True))


def keyed(seed: int, trial: int) -> np.random.Generator:
    """The generator of one trial's params: whatever was drawn before, it draws the same."""
    return np.random.default_rng([seed, trial])


def sweep_seed(cfg: Config) -> int:
    """The seed that the trials of a sweep are drawn from."""
    return cfg.SEED if cfg.TUNE.SEED is None else cfg.TUNE.SEED


def workers_of_trial(cfg: Config) -> tuple[int, int]:
    """Processes and virtual workers of each trial; left open, one: a run takes all there are, a sweep more trials.

    Of elastic ones the most processes. ConfigError where what they come to would depend on the cluster, or on chance.
    """
    scale = cfg.SCALE
    if not scale.is_elastic:
        num_workers = scale.NUM_WORKERS or 1
        return num_workers, scale.VIRTUAL_WORKERS or num_workers
    if scale.NUM_WORKERS is None and scale.VIRTUAL_WORKERS is None:
        raise ConfigError(
            f"SCALE.MIN_WORKERS is {scale.MIN_WORKERS} and NUM_WORKERS, which is the most, is left open: batches of "
            f"trials would depend on the cluster. Say how many (--num_workers {scale.MIN_WORKERS}-N)"
        )
    exact = cfg.TUNE.SPACE.get("SCALE.EXACT")
    if scale.EXACT is False or (exact is not None and False in distribution(exact).examples()):
        raise ConfigError(
            "SCALE.EXACT is false and trials are elastic: results would depend on when the number of workers changes. "
            "Set SCALE.EXACT to true, or give trials one number of workers (--num_workers N)"
        )
    most = scale.NUM_WORKERS or scale.VIRTUAL_WORKERS or 1
    return most, scale.VIRTUAL_WORKERS or most


def objective(cfg: Config) -> tuple[str, str]:
    """(metric, max or min) that a sweep compares its trials by: TUNE's, else CHECKPOINT's, else the least loss."""
    metric = cfg.TUNE.METRIC or cfg.CHECKPOINT.METRIC or "loss"
    known = cfg.CHECKPOINT.MODE if metric == cfg.CHECKPOINT.METRIC else "min" if metric == "loss" else "max"
    return metric, cfg.TUNE.MODE or known


def trial_config(cfg: Config, params: Mapping[str, Any], trial: int) -> Config:
    """The config of one trial of the sweep `cfg`, which runs as any other; ConfigError if it cannot be."""
    name = f"trial_{trial:04d}"
    own = {"EXTRA_TAG": f"{cfg.EXTRA_TAG}/{name}", "TUNE": {}}
    return with_values(cfg, {**cfg.TUNE.CONSTANTS, **params, **own}, where=name)
