"""Which params a sweep tries next: a function of the seed, the trial's number and what is known by then."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np

from raytrain.config.distributions import Distribution, Range, Steps
from raytrain.config.sections import Config
from raytrain.errors import ConfigError
from raytrain.sweep.space import Combinations, Params, Space, keyed, objective


class Observation(NamedTuple):
    """A trial that was made: its params, and its best value so far.

    value: None for one that has none yet, because it runs or because it failed
    """

    params: Params
    value: float | None


class Search(Protocol):
    """How a sweep chooses params."""

    def params_of(self, trial: int, observations: Sequence[Observation]) -> Params | None:
        """The params of a trial, given those before it; None where the space has no more to try."""

    def num_trials(self, num_samples: int) -> int:
        """How many trials a sweep of so many samples has."""


def build_search(cfg: Config, seed: int) -> Search:
    """The search that TUNE.SEARCH names; ConfigError if it lacks its package or there is nothing to vary."""
    space, kind = Space.of(cfg.TUNE), cfg.TUNE.SEARCH
    if not space.entries:
        raise ConfigError(
            "TUNE.SPACE is empty, so there is nothing to vary; name a key and its range, as "
            "SPACE: {OPTIMIZATION.LR: {loguniform: [1e-4, 1e-1]}}"
        )
    if kind in ("tpe", "gp"):
        _need_optuna(kind)
        return OptunaSearch(space, seed, kind, objective(cfg)[1])
    return GridSearch(space.of_lists()) if kind == "grid" or space.is_grid else RandomSearch(space, seed)


@dataclasses.dataclass(frozen=True)
class GridSearch:
    """Each combination once, however many samples are asked for: one that came twice would be the same training."""

    points: Combinations

    def params_of(self, trial: int, observations: Sequence[Observation]) -> Params | None:
        return self.points.at(trial) if trial < self.points.size else None

    def num_trials(self, num_samples: int) -> int:
        return self.points.size


@dataclasses.dataclass(frozen=True)
class RandomSearch:
    """Each combination of the grids in turn, the other keys drawn anew for each trial."""

    space: Space
    seed: int

    def params_of(self, trial: int, observations: Sequence[Observation]) -> Params | None:
        points = self.space.of_grids()
        return {**self.space.sample(keyed(self.seed, trial)), **points.at(trial % points.size)}

    def num_trials(self, num_samples: int) -> int:
        return num_samples * self.space.of_grids().size


@dataclasses.dataclass(frozen=True)
class OptunaSearch:
    """Optuna's TPE (kind "tpe") or Gaussian process ("gp"), which draw at random until ten trials have values."""

    space: Space
    seed: int
    kind: str
    mode: str

    def params_of(self, trial: int, observations: Sequence[Observation]) -> Params | None:
        with _alone(self.seed, trial):
            drawn = self.study_of(trial, observations).ask(self.distributions()).params
        return _decoded(self.space, drawn)

    def num_trials(self, num_samples: int) -> int:
        return num_samples

    def study_of(self, trial: int, observations: Sequence[Observation]) -> Any:
        """A study of these trials alone: made anew, so that nothing of an earlier question is in it."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        samplers, states, distributions = optuna.samplers, optuna.trial.TrialState, self.distributions()
        directions = {"min": optuna.study.StudyDirection.MINIMIZE, "max": optuna.study.StudyDirection.MAXIMIZE}
        seed = int(keyed(self.seed, trial).integers(2**32))
        sampler: optuna.samplers.BaseSampler
        if self.kind == "tpe":
            sampler = samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        else:
            sampler = samplers.GPSampler(seed=seed, deterministic_objective=True)
        study = optuna.create_study(direction=directions[self.mode], sampler=sampler)
        for params, value in _known(self.space, observations):
            coded = {key: _coded(drawn, params[key]) for key, drawn in self.space.entries.items()}
            state = states.RUNNING if value is None else states.COMPLETE
            study.add_trial(
                optuna.trial.create_trial(params=coded, distributions=distributions, value=value, state=state)
            )
        return study

    def distributions(self) -> dict[str, Any]:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        def of(drawn: Distribution) -> Any:
            if isinstance(drawn, Range):
                return FloatDistribution(drawn.low, drawn.high, log=drawn.log)
            if isinstance(drawn, Steps):
                return IntDistribution(0, drawn.size - 1)
            return CategoricalDistribution(range(drawn.size))

        return {key: of(drawn) for key, drawn in self.space.entries.items()}


def _known(space: Space, observations: Sequence[Observation]) -> list[Observation]:
    """Those of trials of this space; a value that is not finite is none."""
    return [
        Observation(params, value if value is not None and math.isfinite(value) else None)
        for params, value in observations
        if params.keys() == space.entries.keys()
    ]


def _coded(drawn: Distribution, value: Any) -> Any:
    """A value as packages take it: steps and options by their index, so that it comes back as the config has it."""
    return min(max(float(value), drawn.low), drawn.high) if isinstance(drawn, Range) else drawn.index(value)


def _decoded(space: Space, coded: Params) -> Params:
    def of(drawn: Distribution, value: Any) -> Any:
        return min(max(float(value), drawn.low), drawn.high) if isinstance(drawn, Range) else drawn.at(int(value))

    return {key: of(drawn, coded[key]) for key, drawn in space.entries.items()}


@contextmanager
def _alone(seed: int, trial: int) -> Iterator[None]:
    """A package's own randomness seeded, its warnings to its own users not shown; numpy's generator as it was after."""
    state = np.random.get_state()
    level = logging.root.manager.disable
    try:
        np.random.seed(int(keyed(seed, trial).integers(2**32, size=2)[1]))  # [0] is the package's own generator's
        logging.disable(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        np.random.set_state(state)


def _need_optuna(kind: str) -> None:
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            f"TUNE.SEARCH is {kind}, but optuna cannot be imported; "
            'pip install "raytrain[tune]", or set TUNE.SEARCH to random'
        )
