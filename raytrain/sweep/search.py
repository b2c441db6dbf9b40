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

from raytrain.config.distributions import Distribution, Options, Range, Steps
from raytrain.config.sections import Config
from raytrain.errors import ConfigError
from raytrain.sweep.space import Combinations, Params, Space, keyed, objective


class Told(NamedTuple):
    """A trial that was made: its params, its best value so far, and the epochs that this took.

    value: None for one that has none yet, because it runs or because it failed
    """

    params: Params
    value: float | None
    epochs: int = 1


class Search(Protocol):
    """How a sweep chooses params."""

    def params_of(self, trial: int, told: Sequence[Told]) -> Params | None:
        """The params of a trial, `told` being the trials before it; None where the space has no more to try."""

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
        _need(["optuna"], kind, "tune")
        return OptunaSearch(space, seed, kind, objective(cfg)[1])
    if kind == "bohb":
        _need(["hpbandster", "ConfigSpace"], kind, "bohb")
        search = BohbSearch(space, seed, objective(cfg)[1])
        try:
            search.params_of(0, ())
        except ValueError as error:  # its floats are coarser than ours
            raise ConfigError(
                f"TUNE.SEARCH is bohb, whose ConfigSpace cannot draw from this SPACE: {error}. "
                "Widen that range, or set TUNE.SEARCH to tpe"
            ) from error
        return search
    return GridSearch(space.of_lists()) if kind == "grid" or space.is_grid else RandomSearch(space, seed)


@dataclasses.dataclass(frozen=True)
class GridSearch:
    """Each combination once, however many samples are asked for: one that came twice would be the same training."""

    points: Combinations

    def params_of(self, trial: int, told: Sequence[Told]) -> Params | None:
        return self.points.at(trial) if trial < self.points.size else None

    def num_trials(self, num_samples: int) -> int:
        return self.points.size


@dataclasses.dataclass(frozen=True)
class RandomSearch:
    """Each combination of the grids in turn, the other keys drawn anew for each trial."""

    space: Space
    seed: int

    def params_of(self, trial: int, told: Sequence[Told]) -> Params | None:
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

    def params_of(self, trial: int, told: Sequence[Told]) -> Params | None:
        with _alone(self.seed, trial):
            drawn = self.study_of(trial, told).ask(self.distributions()).params
        return _decoded(self.space, drawn)

    def num_trials(self, num_samples: int) -> int:
        return num_samples

    def study_of(self, trial: int, told: Sequence[Told]) -> Any:
        """A study that knows `told` and nothing else: made anew, so that nothing of an earlier question is in it."""
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
        for params, value, _ in _known(self.space, told):
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
            return (
                CategoricalDistribution(range(drawn.size)) if _unordered(drawn) else IntDistribution(0, drawn.size - 1)
            )

        return {key: of(drawn) for key, drawn in self.space.entries.items()}


@dataclasses.dataclass(frozen=True)
class BohbSearch:
    """BOHB's model of good and bad params at the most epochs that enough trials have reached.

    A third of its trials are drawn at random, and so are all until each such group has a key's count and one more.
    """

    space: Space
    seed: int
    mode: str

    def params_of(self, trial: int, told: Sequence[Told]) -> Params | None:
        with _alone(self.seed, trial):
            generator = self.generator_of(trial, told)
            drawn, _ = generator.get_config(None)
        return _decoded(self.space, dict(drawn))

    def num_trials(self, num_samples: int) -> int:
        return num_samples

    def generator_of(self, trial: int, told: Sequence[Told]) -> Any:
        """BOHB's generator that knows `told` and nothing else, without the rest of hpbandster, its servers."""
        import ConfigSpace
        from hpbandster.optimizers.config_generators.bohb import BOHB

        def of(key: str, drawn: Distribution) -> Any:
            if isinstance(drawn, Range):
                return ConfigSpace.UniformFloatHyperparameter(key, drawn.low, drawn.high, log=drawn.log)
            if _unordered(drawn):
                return ConfigSpace.CategoricalHyperparameter(key, list(range(drawn.size)))
            return ConfigSpace.UniformIntegerHyperparameter(key, 0, drawn.size - 1)

        space = ConfigSpace.ConfigurationSpace(seed=int(keyed(self.seed, trial).integers(2**32)))
        space.add(*(of(key, drawn) for key, drawn in self.space.entries.items()))
        generator = BOHB(space)
        sign = -1.0 if self.mode == "max" else 1.0
        for params, value, epochs in sorted(_known(self.space, told), key=lambda known: known.epochs):
            if value is not None:
                coded = {key: _coded(drawn, params[key]) for key, drawn in self.space.entries.items()}
                generator.new_result(_Job({"loss": sign * value}, {"budget": epochs, "config": coded}))
        return generator


@dataclasses.dataclass(frozen=True)
class _Job:
    """A finished trial, as BOHB reads it."""

    result: dict[str, float]
    kwargs: dict[str, Any]
    exception: None = None


def _known(space: Space, told: Sequence[Told]) -> list[Told]:
    """`told` without the trials of another space; a value that is not finite is none."""
    return [
        Told(params, value if value is not None and math.isfinite(value) else None, epochs)
        for params, value, epochs in told
        if params.keys() == space.entries.keys()
    ]


def _coded(drawn: Distribution, value: Any) -> Any:
    """A value as packages take it: steps and options by their index, so that it comes back as the config has it."""
    return min(max(float(value), drawn.low), drawn.high) if isinstance(drawn, Range) else drawn.index(value)


def _decoded(space: Space, coded: Params) -> Params:
    def of(drawn: Distribution, value: Any) -> Any:
        return min(max(float(value), drawn.low), drawn.high) if isinstance(drawn, Range) else drawn.at(int(value))

    return {key: of(drawn, coded[key]) for key, drawn in space.entries.items()}


def _unordered(drawn: Steps | Options) -> bool:
    return isinstance(drawn, Options) or drawn.size == 1  # a range of one whole number is none to ConfigSpace


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


def _need(packages: Sequence[str], kind: str, extra: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"TUNE.SEARCH is {kind}, but {' and '.join(missing)} cannot be imported; "
            f'pip install "raytrain[{extra}]", or set TUNE.SEARCH to random'
        )
