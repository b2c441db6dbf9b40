"""How much each swept key matters: what it explains, by itself, of the differences between trials."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

from raytrain.sweep.view import SweepView, TrialView, short_names

WIDE = 50  # values of a choice that span so much are drawn on a logarithmic axis
LARGEST_POWER = sys.float_info.max_10_exp  # of ten, in a float


@dataclasses.dataclass(frozen=True)
class Factor:
    """How much a swept key matters. share: 0 to 1, of the differences between trials that it explains alone"""

    key: str
    name: str
    share: float
    says: str


def importance(view: SweepView) -> list[Factor]:
    """What each swept key explains by itself, most first.

    A trial's score is the share of the other trials that it beats, each pair compared at the last epoch that both were
    evaluated at: so one that was stopped early is not held against one that had more epochs. The share is the adjusted
    R2 of a parabola (of a key with names: of a mean for each) through the scores: a best value in the middle of a range
    counts as much as one at an end, and what chance alone would explain is taken off. No randomness is in it.
    """
    scores = scores_of(view)
    names = short_names(view.keys)
    factors = []
    for key in view.keys:
        facts = key_facts(view, key)
        pairs = [(view.trials[n].params.get(key), score) for n, score in scores.items()]
        share, says = _variance_explained(facts, pairs) if len(pairs) > 1 else (0.0, "too few trials to tell")
        factors.append(Factor(key, names[key], share, says))
    return sorted(factors, key=lambda factor: -factor.share)


def scores_of(view: SweepView) -> dict[int, float]:
    """Of each trial with a curve the share of comparisons that it wins, a tie half; see `importance`."""
    import numpy as np

    trials = [trial for trial in by_number(view) if trial.curve]
    epochs = sorted({epoch for trial in trials for epoch, _, _ in trial.curve}, reverse=True)
    column = {epoch: index for index, epoch in enumerate(epochs)}
    reached = np.zeros((len(trials), len(epochs)), bool)
    worth = np.full(reached.shape, -np.inf)  # the more the better; what was not finite loses to all that was
    sign, rows, scores = 1 if view.mode == "max" else -1, np.arange(len(trials)), {}
    for row, trial in enumerate(trials):
        for epoch, _, value in trial.curve:
            reached[row, column[epoch]] = True
            if value is not None:
                worth[row, column[epoch]] = sign * value
    for row, trial in enumerate(trials):
        shared = reached & reached[row]
        met, last = shared.any(axis=1) & (rows != row), shared.argmax(axis=1)  # the first column is the last epoch
        mine, theirs = worth[row, last[met]], worth[rows[met], last[met]]
        if met.any():
            scores[trial.number] = float(((mine > theirs) + 0.5 * (mine == theirs)).mean())
    return scores


def _variance_explained(facts: dict[str, Any], pairs: list[tuple[Any, float]]) -> tuple[float, str]:
    """The share of the scores' differences that the values explain, and where they are best."""
    import numpy as np

    y = np.array([score for _, score in pairs])
    if facts["kind"] == "choice":
        names = [str(value) for value, _ in pairs]
        means = {name: float(np.mean([s for n, s in zip(names, y, strict=True) if n == name])) for name in names}
        fitted, terms = np.array([means[name] for name in names]), len(means) - 1
        says = f"best with {max(means, key=lambda name: means[name])}"
    else:
        halves = np.array([_size(value, facts["log"]) / 2 for value, _ in pairs])  # their differences are finite
        low, span = float(halves.min()), float(np.ptp(halves))
        x = np.round((halves - low) / (span or 1.0), 6)  # values closer than that would leave the parabola open
        terms = min(2, len(set(x.tolist())) - 1)
        parabola = np.polynomial.polynomial.polyfit(x, y, terms)
        fitted = np.polynomial.polynomial.polyval(x, parabola)
        fine = np.linspace(0, 1, 101)
        place = float(fine[np.argmax(np.polynomial.polynomial.polyval(fine, parabola))])
        at, where = 2 * (low + place * span), {0.0: "the low end, ", 1.0: "the high end, "}.get(place, "")
        says = f"best near {where}{10 ** min(at, LARGEST_POWER) if facts['log'] else at:.2g}"
    total, left = float(((y - y.mean()) ** 2).sum()), float(((y - fitted) ** 2).sum())
    free = len(y) - terms - 1
    if terms < 1 or free < 1 or total < 1e-12:
        return 0.0, "too few different values to tell"
    share = 1 - (left / free) / (total / (len(y) - 1))
    return (share, says) if share > 0.01 else (0.0, "nothing that chance would not explain")


def _size(value: int | float, log: bool) -> float:
    """The value where its axis has it, a float: whole numbers of a config may be larger than any."""
    return math.log10(value) if log else float(min(max(value, -sys.float_info.max), sys.float_info.max))


def key_facts(view: SweepView, key: str) -> dict[str, Any]:
    """Name of a swept key; kind number or choice; whether its axis is logarithmic; its range, where the space says."""
    values: list[Any] = [trial.params.get(key) for trial in view.trials.values()]
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    spec = view.space.get(key) or {}
    kind, bounds = next(iter(spec.items()), ("", [])) if isinstance(spec, dict) else ("", [])
    positive = numbers and bool(values) and min(values) > 0
    listed = kind in ("choice", "grid", "")
    log = positive and (kind == "loguniform" or (listed and max(values) >= WIDE * min(values)))
    is_within = not listed and numbers and bool(values) and bounds[0] <= min(values) and max(values) <= bounds[1]
    return {
        "key": key,
        "name": short_names(view.keys)[key],
        "kind": "number" if numbers else "choice",
        "log": log,
        "range": [float(bounds[0]), float(bounds[1])] if is_within else None,
    }


def by_number(view: SweepView) -> list[TrialView]:
    return [view.trials[number] for number in sorted(view.trials)]
