"""Clip advice: what the gradient norms in the trials' journals say about OPTIMIZATION.GRAD_NORM_CLIP.

The rule. Taken are the norms of the better half of the trials, without the first tenth of each one's steps (warm-up).
A clip is proposed from the value that touches 10 % of these steps to the one that touches 1 %: ordinary steps are left
alone, rare large ones are cut. Where the best trial's own clip lies lower, the range begins there: hard clipping has
earned its place in this sweep. Norms that were not finite are left out: such a step has no effect.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import yaml

from raytrain.journal.records import read_journal
from raytrain.storage.lock import JOURNAL
from raytrain.storage.storage import Storage
from raytrain.sweep.ledger import trial_folder
from raytrain.sweep.view import SweepView, TrialView

CLIP = "OPTIMIZATION.GRAD_NORM_CLIP"
WARM_UP = 0.1  # of a trial's steps
OFTEN, SELDOM = 0.1, 0.01  # the range touches so many of the steps
ENOUGH = 50  # norms; a 99 % quantile of fewer says nothing
LADDER = tuple(mantissa * 10.0**power for power in range(-6, 7) for mantissa in (1, 2, 5))


@dataclasses.dataclass(frozen=True)
class TrialNorms:
    """The gradient norms that one trial's journal holds.

    norms:   of each recorded step, oldest first
    clip:    the newest clip, None where nothing is clipped
    touched: the share of these steps whose norm was above the clip of their epoch
    """

    number: int
    norms: list[float]
    clip: float | None
    touched: float


@dataclasses.dataclass(frozen=True)
class ClipAdvice:
    """What is known of the clip; `low` and `high` are None where it is too little to propose anything.

    trials:    those with norms in their journals, best first
    better:    numbers of those whose norms are taken
    taken:     these norms, smallest first
    quantiles: 0.5, 0.9 and 0.99 of the norms taken
    ladder:    (clip, share of the taken steps that it would touch), by clip
    """

    trials: list[TrialNorms]
    better: list[int]
    taken: list[float]
    quantiles: dict[float, float]
    ladder: list[tuple[float, float]]
    low: float | None
    high: float | None


def clip_advice(storage: Storage, view: SweepView) -> ClipAdvice:
    """Reads the journals of the sweep in this folder. A trial without one has no norms."""
    ranked = [trial for trial in view.ranked() if trial.curve]
    journals = (norms_of(storage, trial) for trial in ranked)
    return advice_of([trial for trial in journals if trial.norms])


def advice_of(trials: list[TrialNorms]) -> ClipAdvice:
    """trials: best first"""
    better = trials[: math.ceil(len(trials) / 2)]
    taken = sorted(norm for trial in better for norm in trial.norms[int(WARM_UP * len(trial.norms)) :])
    numbers = [trial.number for trial in better]
    if len(taken) < ENOUGH:
        return ClipAdvice(trials, numbers, taken, {}, [], None, None)
    low, high = quantile(taken, 1 - OFTEN), quantile(taken, 1 - SELDOM)
    best = better[0].clip
    return ClipAdvice(
        trials,
        numbers,
        taken,
        {q: quantile(taken, q) for q in (0.5, 0.9, 0.99)},
        [(clip, touched(taken, clip)) for clip in _rungs(taken)],
        rounded(low if best is None else min(low, best), math.floor),
        rounded(high, math.ceil),
    )


def norms_of(storage: Storage, trial: TrialView) -> TrialNorms:
    """The norms in the journal of this trial of the sweep, and what its clip did with them."""
    folder = trial_folder(trial.number)
    clips = clips_of(trial, _optimization(storage, folder))
    records = read_journal(storage, f"{folder}/{JOURNAL}", kinds=("step",))
    steps = [record for record in records if record.get("grad_norm") is not None]
    cut = sum(1 for step in steps if (clip := clip_at(clips, step["epoch"])) is not None and step["grad_norm"] > clip)
    norms = [float(step["grad_norm"]) for step in steps]
    return TrialNorms(trial.number, norms, clips[-1][1], cut / max(1, len(steps)))


def clips_of(trial: TrialView, optimization: Mapping[str, Any]) -> list[tuple[int, float | None]]:
    """(epoch, the clip from then on), by epoch: of a clone by its history, else of the config with its PHASES."""
    clip = optimization.get("GRAD_NORM_CLIP")
    if trial.clones:
        return [(epoch, params.get(CLIP, clip)) for epoch, params in trial.history]
    phases = sorted(optimization.get("PHASES") or [], key=lambda phase: phase["FROM_EPOCH"])
    later = [(phase["FROM_EPOCH"], phase["GRAD_NORM_CLIP"]) for phase in phases if "GRAD_NORM_CLIP" in phase]
    return [(0, trial.params.get(CLIP, clip)), *later]


def clip_at(clips: list[tuple[int, float | None]], epoch: int) -> float | None:
    return [clip for since, clip in clips if since <= epoch][-1]


def quantile(ordered: list[float], q: float) -> float:
    """The smallest of the ordered values that a share `q` of them does not exceed."""
    return ordered[max(0, math.ceil(q * len(ordered) - 1e-9) - 1)]


def touched(ordered: list[float], clip: float) -> float:
    """The share of the ordered norms that are above the clip."""
    return 1 - bisect.bisect_right(ordered, clip) / len(ordered)


def rounded(value: float, to: Any) -> float:
    """Two significant digits. to: math.floor or math.ceil"""
    if value <= 0:
        return 0.0
    digits = 1 - math.floor(math.log10(value))
    return round(to(round(value * 10.0**digits, 6)) / 10.0**digits, digits)


def advice_lines(advice: ClipAdvice) -> list[str]:
    """The advice for a terminal."""
    if advice.low is None or advice.high is None:
        return [
            f"clip advice: none; {len(advice.taken)} gradient norms in the journals of the better trials are too few "
            f"({ENOUGH} are needed). Train longer, or journal more steps: LOG.EVERY: 1"
        ]
    best, half = advice.trials[0], [t for t in advice.trials if t.number in advice.better and t.clip is not None]
    middle, often, seldom = (f"{advice.quantiles[q]:.3g}" for q in (0.5, 0.9, 0.99))
    trials = f"{len(advice.better)} better" if len(advice.trials) > 1 else "1"
    of = f"of {len(advice.trials)} trials" if len(advice.trials) > 1 else "trial"
    cut = f"at {best.clip:.3g}, which touched {best.touched:.0%} of its steps" if best.clip else "nothing"
    unclipped = " (it trained as if there were no clip)" if best.clip and best.touched < SELDOM else ""
    lines = [
        f"clip advice: try GRAD_NORM_CLIP from {advice.low:g} to {advice.high:g}",
        f"  from {len(advice.taken):,} gradient norms after warm-up, of the {trials} {of}: half are below {middle}, "
        f"90 % below {often}, 99 % below {seldom}",
        "  so ordinary steps stay as they are, and the rare large ones are cut"
        if advice.low >= rounded(advice.quantiles[0.9], math.floor)
        else f"  it begins below that 90 % because the best trial clips at {best.clip:.3g}",
        f"  trial {best.number}, the best, clips {cut}{unclipped}",
    ]
    if len(half) > 1:
        shares = [trial.touched for trial in half]
        lines.append(f"  clipping touched {min(shares):.0%} to {max(shares):.0%} of the steps of the better trials")
    lines.append(
        "  a clip would touch  " + ", ".join(f"{round(100 * share, 1):g}% at {clip:g}" for clip, share in advice.ladder)
    )
    return [*lines, f"  to search there  {CLIP}: {{loguniform: [{advice.low:g}, {advice.high:g}]}}"]


def _rungs(ordered: list[float]) -> list[float]:
    """1-2-5 values from one that touches nearly all to one that touches next to nothing; ten at most."""
    first = bisect.bisect_right(LADDER, quantile(ordered, 0.05)) - 1
    last = bisect.bisect_left(LADDER, quantile(ordered, 0.999)) + 1
    return list(LADDER[max(0, first, last - 10) : last])


def _optimization(storage: Storage, folder: str) -> Mapping[str, Any]:
    """The OPTIMIZATION section of the trial's config; empty where there is none."""
    name = f"{folder}/config.yaml"
    try:
        config = yaml.safe_load(storage.read_bytes(name)) if storage.exists(name) else {}
    except yaml.YAMLError:  # somebody has damaged it: there is no advice from this trial
        config = {}
    section = config.get("OPTIMIZATION") if isinstance(config, dict) else None
    return section if isinstance(section, dict) else {}
