"""The scheduler that TUNE.SCHEDULER names: Ray Tune's own, made resumable."""

from __future__ import annotations

from typing import Any

from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from raytrain.config.distributions import Distribution, Range
from raytrain.sweep.population import ResumablePB2, ResumablePBT
from raytrain.sweep.resumable import (
    SCORE,
    ResumableHyperBand,
    ResumableMedian,
    ResumableScheduler,
    SchedulerSettings,
)
from raytrain.sweep.space import Space
from raytrain.sweep.sweep import Sweep

SYNCHRONOUS = ("hyperband", "pbt", "pb2")  # compare trials that have come equally far: all have to be there at first
ASYNCHRONOUS = ("asha", "median")  # compare a trial with those that came as far before it


def build_scheduler(tune_cfg: Any, settings: SchedulerSettings, sweep: Sweep) -> TrialScheduler:
    """The one that TUNE asks for, with `ResumableScheduler` mixed in."""
    made: Any = MAKERS[tune_cfg.SCHEDULER](tune_cfg, settings)
    made.sweep, made.settings = sweep, settings
    made.asynchronous, made.synchronous = tune_cfg.SCHEDULER in ASYNCHRONOUS, tune_cfg.SCHEDULER in SYNCHRONOUS
    made.added, made.reported, made.clones = set(), set(), set()
    return made


def resumable(kind: type, mixin: type = ResumableScheduler) -> Any:
    return type(kind.__name__, (mixin, kind), {})


def _none(tune_cfg: Any, settings: SchedulerSettings) -> Any:
    return resumable(FIFOScheduler)()


def _asha(tune_cfg: Any, settings: SchedulerSettings) -> Any:
    return resumable(AsyncHyperBandScheduler)(
        time_attr=settings.unit,
        metric=SCORE,
        mode=settings.mode,
        max_t=settings.end,
        grace_period=min(tune_cfg.GRACE, settings.end),
        reduction_factor=tune_cfg.REDUCTION,
        stop_last_trials=False,
    )


def _hyperband(tune_cfg: Any, settings: SchedulerSettings) -> Any:
    return resumable(HyperBandScheduler, ResumableHyperBand)(
        time_attr=settings.unit,
        metric=SCORE,
        mode=settings.mode,
        max_t=settings.end,
        reduction_factor=tune_cfg.REDUCTION,
        stop_last_trials=False,
    )


def _median(tune_cfg: Any, settings: SchedulerSettings) -> Any:
    return resumable(MedianStoppingRule, ResumableMedian)(
        time_attr=settings.unit, metric=SCORE, mode=settings.mode, grace_period=tune_cfg.GRACE, min_samples_required=3
    )


def _pbt(tune_cfg: Any, settings: SchedulerSettings) -> Any:
    space = Space.of(tune_cfg).entries

    def within(params: dict[str, Any]) -> dict[str, Any]:
        """A perturbed value stays within its range."""
        for key, drawn in space.items():
            if isinstance(drawn, Range):
                params[key] = min(max(params[key], drawn.low), drawn.high)
        return params

    return resumable(PopulationBasedTraining, ResumablePBT)(
        time_attr=settings.unit,
        metric=SCORE,
        mode=settings.mode,
        perturbation_interval=tune_cfg.PERTURB_EVERY,
        hyperparam_mutations={key: mutation_of(drawn) for key, drawn in space.items()},
        quantile_fraction=tune_cfg.QUANTILE,
        resample_probability=tune_cfg.RESAMPLE,
        custom_explore_fn=within,
        log_config=False,
        synch=True,
    )


def mutation_of(drawn: Distribution) -> Any:
    """A distribution of TUNE.SPACE as Ray's PBT takes it; of steps and options those beside one are next to it."""
    if isinstance(drawn, Range):
        return (tune.loguniform if drawn.log else tune.uniform)(drawn.low, drawn.high)
    return [drawn.at(index) for index in range(drawn.size)]


def _pb2(tune_cfg: Any, settings: SchedulerSettings) -> Any:
    from ray.tune.schedulers.pb2 import PB2

    bounds = {key: list(next(iter(dict(entry).values())))[:2] for key, entry in tune_cfg.SPACE.items()}
    return resumable(PB2, ResumablePB2)(
        time_attr=settings.unit,
        metric=SCORE,
        mode=settings.mode,
        perturbation_interval=tune_cfg.PERTURB_EVERY,
        hyperparam_bounds=bounds,
        quantile_fraction=tune_cfg.QUANTILE,
        log_config=False,
        synch=True,
    )


MAKERS = {"none": _none, "asha": _asha, "hyperband": _hyperband, "median": _median, "pbt": _pbt, "pb2": _pb2}
