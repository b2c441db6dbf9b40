"""What a sweep has done: an append-only ledger, and the sweep as its records tell it.

sweep.jsonl holds one JSON object a line; a line that a killed driver tore is passed over. Each record has `kind` and
`time` (seconds since 1970); `epoch` counts finished epochs.

sweep    a launch of the sweep: scheduler, search, metric, mode, num_samples, seed, num_epochs, space, concurrent
trial    a trial is made: trial, params {dotted key: value}
start    it trains, again too, from the state after `epoch`: trial, epoch
result   trial, epoch, step, value, metrics {}, seconds (of training, of this trial, over all launches), key;
         repeated: true where it was known, and not trained again
clone    it goes on from another trial's state: trial, epoch, from, params, config_phases
stopped  for good: trial, epoch, why
done     all its epochs are trained: trial, epoch
failed   trial, epoch, error, logs, why (diverged, or null)
end      a launch ends: status, best, value, seconds
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from types import NoneType
from typing import Any

from raytrain.journal.records import Record, read_records, strict
from raytrain.journal.run_folder import RunFolder
from raytrain.journal.sinks import JsonlSink
from raytrain.storage.storage import Storage

LEDGER = "sweep.jsonl"
PUBLISH_S = 5.0  # behind a URI each copy is of the whole file: results wait this long for the next
STATES = ("running", "done", "stopped", "failed", "waiting")


class Ledger:
    """Appends to the ledger of a sweep's folder. On a disk a record is in the file when `append` returns; behind a
    URI those that decide something are, and results at most PUBLISH_S of record time later, or with `close`."""

    def __init__(self, folder: RunFolder) -> None:
        """folder: made as RunFolder(uri, LEDGER); its owner closes it, after this."""
        self._folder = folder
        self._sink = JsonlSink(folder.local / LEDGER)
        self._published_at = float("-inf")

    def append(self, record: Record) -> Record:
        """Writes the record; returns it as a reader will see it."""
        record = strict(record)
        self._sink.write(record)
        self._sink.flush()
        if record["kind"] != "result" or record["time"] >= self._published_at + PUBLISH_S:
            self._published_at = record["time"]
            self._folder.publish()
        return record

    def close(self) -> None:
        self._sink.close()
        self._folder.publish()


def trial_folder(number: int) -> str:
    """Name of a trial's run folder within the sweep's."""
    return f"trial_{number:04d}"


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Each dotted key with as many of its last names as tell it from the others: LR, or A.LR and B.LR."""
    parts = {key: key.split(".") for key in keys}
    short = {}
    for key, own in parts.items():
        others = [other for name, other in parts.items() if name != key]
        length = next((n for n in range(1, len(own)) if all(o[-n:] != own[-n:] for o in others)), len(own))
        short[key] = ".".join(own[-length:])
    return short


def read_ledger(storage: Storage) -> list[Record]:
    """The records of the sweep in this folder, oldest first; none where there is no ledger yet."""
    made: set[int] = set()
    return [record for record in read_records(storage, LEDGER) if _is_sound(record, made)]


def _is_sound(record: Record, made: set[int]) -> bool:
    """Whether it says what its kind says; made: the trials that there are, whose records count."""
    kind, number = record.get("kind"), record.get("trial")
    if not isinstance(kind, str) or not isinstance(record.get("time"), (int, float)):
        return False
    if kind not in CHANGES:
        return True
    if any(not isinstance(record.get(name), TYPES[name]) for name in NEEDED[kind]):
        return False
    if kind == "trial":
        made.add(record["trial"])
    return number in made and record.get("from", number) in made


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


TYPES: dict[str, Any] = {"trial": int, "epoch": int, "from": int, "params": dict, "value": (int, float, NoneType)}
NEEDED = {
    "trial": ("trial", "params"),
    "start": ("trial", "epoch"),
    "result": ("trial", "epoch", "value"),
    "clone": ("trial", "epoch", "from", "params"),
    **dict.fromkeys(("stopped", "done", "failed"), ("trial", "epoch")),
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
