"""The sweep as the records of its ledger tell it so far: its trials, their states and curves, the best of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from raytrain.journal.records import Record

STATES = ("running", "done", "stopped", "failed", "waiting")


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Each dotted key with as many of its last names as tell it from the others: LR, or A.LR and B.LR."""
    parts = {key: key.split(".") for key in keys}
    short = {}
    for key, own in parts.items():
        others = [other for name, other in parts.items() if name != key]
        length = next((n for n in range(1, len(own)) if all(o[-n:] != own[-n:] for o in others)), len(own))
        short[key] = ".".join(own[-length:])
    return short


@dataclasses.dataclass
class TrialView:
    """One trial, as its records tell it so far.

    curve:    (epoch, step, value) of the evaluations that count, by epoch; value None where it was not finite
    value:    the newest of them
    best:     the best value, with its epoch, of the weights that the trial has now: a clone's earlier ones are gone
    history:  (epoch, params) since which they held: the first, then one for each clone
    phases:   OPTIMIZATION.PHASES that replay what it went through, of its newest clone; None before
    trained:  epochs that were trained, those trained again after a kill too; a clone's inherited ones are not
    """

    number: int
    params: dict[str, Any]
    state: str = "waiting"
    epoch: int = 0
    curve: list[tuple[int, int, float | None]] = dataclasses.field(default_factory=list)
    best: float | None = None
    best_epoch: int | None = None
    seconds: float = 0.0
    trained: int = 0
    history: list[tuple[int, dict[str, Any]]] = dataclasses.field(default_factory=list)
    clones: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # (epoch, number of the other trial)
    phases: list[dict[str, Any]] | None = None
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    why: str | None = None
    error: str | None = None
    logs: str | None = None

    @property
    def value(self) -> float | None:
        return self.curve[-1][2] if self.curve else None

    def forget_after(self, epoch: int) -> bool:
        """What was measured after `epoch` will be measured again. Returns whether the best was, and is to be found."""
        while self.curve and self.curve[-1][0] > epoch:
            self.curve.pop()
        self.epoch = epoch
        return self.best_epoch is not None and self.best_epoch > epoch


@dataclasses.dataclass
class SweepView:
    """The sweep as its records tell it so far: feed each to `add`.

    launch: the newest "sweep" record;   end: the record of its end, None while it runs or where it was killed
    """

    launch: Record = dataclasses.field(default_factory=dict)
    trials: dict[int, TrialView] = dataclasses.field(default_factory=dict)
    end: Record | None = None
    newest: Record = dataclasses.field(default_factory=dict)
    before_s: float = 0.0  # seconds of the earlier launches

    @property
    def metric(self) -> str:
        return str(self.launch.get("metric") or "value")

    @property
    def mode(self) -> str:
        return str(self.launch.get("mode", "max"))

    @property
    def num_epochs(self) -> int:
        return int(self.launch.get("num_epochs", 0))

    @property
    def num_samples(self) -> int:
        """Trials that there will be; more may have been made."""
        return max(int(self.launch.get("num_samples", 0)), len(self.trials))

    @property
    def space(self) -> dict[str, Any]:
        return dict(self.launch.get("space") or {})

    @property
    def keys(self) -> list[str]:
        """Dotted keys that are swept, in the space's order."""
        return list(dict.fromkeys([*self.space, *(key for t in self.trials.values() for key in t.params)]))

    @property
    def best(self) -> TrialView | None:
        """The trial with the best value that has not failed; of equals the one with the smaller number."""
        first = next(iter(self.ranked()), None)
        return first if first is not None and first.best is not None and first.state != "failed" else None

    def ranked(self) -> list[TrialView]:
        """All trials, best first; after those with a value the failed ones, for nobody can train them again, and
        those without."""
        sign = -1.0 if self.mode == "max" else 1.0

        def place(trial: TrialView) -> tuple[bool, bool, float, int]:
            value = 0.0 if trial.best is None else sign * trial.best
            return trial.best is None, trial.state == "failed", value, trial.number

        return sorted(self.trials.values(), key=place)

    def better(self, value: float | None, than: float | None) -> bool:
        if value is None or than is None:
            return value is not None
        return value > than if self.mode == "max" else value < than

    def counts(self) -> dict[str, int]:
        """How many trials are in each state, in the order of STATES."""
        states = [trial.state for trial in self.trials.values()]
        return {state: states.count(state) for state in STATES}

    def elapsed_s(self, now: float | None = None) -> float:
        """Seconds that the sweep ran, over all launches. now: unix seconds, where it still runs."""
        if not self.launch:
            return 0.0
        until = self.newest["time"] if now is None or self.end is not None else now
        return float(self.before_s + max(0.0, until - self.launch["time"]))

    def add(self, record: Record) -> None:
        """Takes one more record; of a kind that is not known nothing."""
        kind = record["kind"]
        if kind in ("sweep", "end"):
            self._add_launch(record)
        elif kind in CHANGES:
            number = record["trial"]
            trial = self.trials.setdefault(number, TrialView(number, {}))
            CHANGES[kind](self, trial, record)
        self.newest = record

    def _add_launch(self, record: Record) -> None:
        if record["kind"] == "sweep":
            self.before_s = self.elapsed_s()
            self.launch, self.end = record, None
        else:
            self.end = record
        for trial in self.trials.values():
            if trial.state == "running":  # of a launch that was killed, or that ends: its turn comes again
                trial.state = "waiting"


def view_of(records: Iterable[Record]) -> SweepView:
    """The sweep that the records tell of."""
    view = SweepView()
    for record in records:
        view.add(record)
    return view


def _made(view: SweepView, trial: TrialView, record: Record) -> None:
    """Anew too: a later launch found that it went another way."""
    trial.params = dict(record["params"])
    trial.history, trial.clones, trial.phases = [(0, trial.params)], [], None
    trial.forget_after(0)
    _find_best(view, trial)


def _started(view: SweepView, trial: TrialView, record: Record) -> None:
    if trial.forget_after(record["epoch"]):
        _find_best(view, trial)
    trial.state, trial.why, trial.error, trial.logs = "running", None, None, None


def _measured(view: SweepView, trial: TrialView, record: Record) -> None:
    if not record.get("repeated"):
        trial.trained += max(0, record["epoch"] - trial.epoch)
    if trial.forget_after(record["epoch"] - 1):
        _find_best(view, trial)
    trial.curve.append((record["epoch"], record.get("step", 0), record["value"]))
    _compare(view, trial, record["epoch"], record["value"])
    trial.state, trial.epoch = "running", record["epoch"]
    trial.seconds, trial.metrics = record.get("seconds", trial.seconds), record.get("metrics") or {}


def _cloned(view: SweepView, trial: TrialView, record: Record) -> None:
    trial.forget_after(record["epoch"])
    trial.state, trial.params = "running", dict(record["params"])
    trial.history.append((record["epoch"], trial.params))
    trial.clones.append((record["epoch"], record["from"]))
    trial.phases = record.get("config_phases")
    trial.best, trial.best_epoch = None, None  # all that was measured was so of other weights


def _ended(view: SweepView, trial: TrialView, record: Record) -> None:
    trial.state, trial.epoch = record["kind"], record.get("epoch", trial.epoch)
    trial.why, trial.error, trial.logs = record.get("why"), record.get("error"), record.get("logs")


CHANGES = {
    "trial": _made,
    "start": _started,
    "result": _measured,
    "clone": _cloned,
    "stopped": _ended,
    "done": _ended,
    "failed": _ended,
}


def _find_best(view: SweepView, trial: TrialView) -> None:
    """Anew, among all that was measured."""
    trial.best, trial.best_epoch = None, None
    for epoch, _, value in trial.curve:
        _compare(view, trial, epoch, value)


def _compare(view: SweepView, trial: TrialView, epoch: int, value: float | None) -> None:
    """Makes it the best if it is better, and of the weights that the trial has now."""
    since = trial.clones[-1][0] if trial.clones else -1
    if epoch > since and view.better(value, trial.best):
        trial.best, trial.best_epoch = value, epoch
