"""What a sweep has done: an append-only ledger, its records one after another.

sweep.jsonl holds one JSON object a line; a line that a killed driver tore is passed over. Each record has `kind` and
`time` (seconds since 1970); `epoch` counts finished epochs.

sweep    a launch of the sweep: scheduler, search, metric, mode, num_samples, seed, num_epochs, space, concurrent,
         source {path: digits of the sha256, of each file of the task's code}
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

from types import NoneType
from typing import Any

from raytrain.journal.records import Record, read_records, strict
from raytrain.journal.run_folder import RunFolder
from raytrain.journal.sinks import JsonlSink
from raytrain.storage.storage import Storage

LEDGER = "sweep.jsonl"
PUBLISH_S = 5.0  # behind a URI each copy is of the whole file: results wait this long for the next


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


def read_ledger(storage: Storage) -> list[Record]:
    """The records of the sweep in this folder, oldest first; none where there is no ledger yet."""
    made: set[int] = set()
    return [record for record in read_records(storage, LEDGER) if _is_sound(record, made)]


def _is_sound(record: Record, made: set[int]) -> bool:
    """Whether it says what its kind says; made: the trials that there are, whose records count."""
    kind, number = record.get("kind"), record.get("trial")
    if not isinstance(kind, str) or not isinstance(record.get("time"), (int, float)):
        return False
    if kind not in NEEDED:
        return True
    if any(not isinstance(record.get(name), TYPES[name]) for name in NEEDED[kind]):
        return False
    if kind == "trial":
        made.add(record["trial"])
    return number in made and record.get("from", number) in made


TYPES: dict[str, Any] = {"trial": int, "epoch": int, "from": int, "params": dict, "value": (int, float, NoneType)}
NEEDED = {
    "trial": ("trial", "params"),
    "start": ("trial", "epoch"),
    "result": ("trial", "epoch", "value"),
    "clone": ("trial", "epoch", "from", "params"),
    **dict.fromkeys(("stopped", "done", "failed"), ("trial", "epoch")),
}
