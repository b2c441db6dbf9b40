"""What a journal says: its records read back, and the lines that people read.

A record is a dict with `kind` and `time` (seconds since 1970) and the fields of its kind.
`epoch` of a step counts from 0 and is the epoch under way; elsewhere it counts finished epochs.

run         a launch starts or resumes after `step`: epoch, steps_per_epoch, num_epochs, line_every, tag;
            shown where given: num_samples, batch_size, accumulate, virtual_workers, num_workers, device,
            resumed_from, launch, param_count; exact: whether its bits are those of any number of workers;
            min_workers, max_workers (of an elastic run)
step        step (iterations done), epoch, iteration (of the epoch, from 0), loss, grad_norm, lr, momentum,
            samples, data_s, step_s, samples_per_s, terms {}, disp {}
eval        step, epoch, metrics {}; shown where given: samples, seconds, best (true: the best so far)
pictures    step, epoch, folder (below the run folder), names (of the files NAME.png in it)
checkpoint  step, epoch, name, stall_s, save_s; weights (the fingerprint of its tensors, storage/fingerprint.py)
event       event (what happened: straggler, note ...), message;
            failure: a launch that trained has failed: the screen that its user saw;
            restart: the workers were started again within a launch: why, and where they go on;
            resize: there are other than so many workers: from, to, why, planned (no step is repeated), seconds (from
            the last step of those to the first of these);
            nonfinite, spike: a step without effect: step, ranks, parameters, samples (ids), action, in_a_row, loss,
            grad_norm;   hang: a worker that was killed for it: rank, step, phase, calls
end         status (finished, stopped), step, epoch; shown where given: metrics {},
            best {}, checkpoint, weights (its fingerprint), best_checkpoint, pictures, run_dir, seconds, message
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from raytrain.errors import StorageError, TaskError
from raytrain.storage.local import LocalStorage
from raytrain.storage.lock import JOURNAL
from raytrain.storage.storage import Storage

Record = dict[str, Any]


def read_journal(
    journal: Storage | str | os.PathLike[str], name: str = JOURNAL, kinds: Collection[str] = ()
) -> list[Record]:
    """The records of a journal that count, oldest first; none where there is no file `name`.

    Dropped are lines that a killed writer tore, step, eval, pictures and checkpoint records, and events of bad
    steps, that a later resume overwrote, and an evaluation or pictures that were made again at the same step.

    journal: the folder that holds it, or its path, at which there must be one
    kinds:   only these; few of the other lines are parsed, which takes most of the time
    """
    if isinstance(journal, (str, os.PathLike)):
        path = Path(journal)
        journal, name = LocalStorage(path.parent), path.name
        if not journal.exists(name):
            raise StorageError(f"{path}: no journal to read there; name a run folder's")
    counting: dict[Any, Record] = {}  # by what a later record is the same as
    for place, record in enumerate(read_records(journal, name, {*kinds, "run"} if kinds else ())):
        key: Any = place
        if record["kind"] == "run":
            counting = {k: r for k, r in counting.items() if not _overwritten(r, record.get("step", 0))}
        elif record["kind"] in ("eval", "pictures"):
            key = record["kind"], record.get("step")
            counting.pop(key, None)
        counting[key] = record
    return [record for record in counting.values() if not kinds or record["kind"] in kinds]


def read_records(storage: Storage, name: str, kinds: Collection[str] = ()) -> list[Record]:
    """All records in this file of JSON lines, oldest first, but for lines that a killed writer tore; none without it.

    kinds: only these; a line that names none of them is not parsed
    """
    if not storage.exists(name):
        return []
    lines = storage.read_bytes(name).decode("utf-8", errors="replace").split("\n")
    words = [f'"{kind}"' for kind in kinds]
    records = map(_parsed, (line for line in lines if not words or any(word in line for word in words)))
    return [record for record in records if record is not None and (not kinds or record["kind"] in kinds)]


def _parsed(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # torn: the start of an object is never an object; or not ours
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    if not isinstance(record.get("step", 0), int):
        return None
    return record


def _overwritten(record: Record, resumed_step: int) -> bool:
    of_a_step = record["kind"] in ("step", "eval", "pictures", "checkpoint")
    of_a_step |= record["kind"] == "event" and record.get("event") in ("nonfinite", "spike")
    return of_a_step and record.get("step", 0) > resumed_step


def strict(record: Mapping[str, Any]) -> Record:
    """The record in plain JSON values: nan and inf become null and are named in `nonfinite`."""
    nonfinite: list[str] = []
    clean: Record = {str(name): _plain(value, str(name), nonfinite) for name, value in record.items()}
    if nonfinite:
        clean["nonfinite"] = nonfinite
    return clean


def _plain(value: Any, name: str, nonfinite: list[str]) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        nonfinite.append(name)
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}.{index}", nonfinite) for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # tensors, arrays and numpy's scalars
        return _plain(value.tolist(), name, nonfinite)
    raise TaskError(
        f"{name} is {value!r} of type {type(value).__name__}, which cannot be journalled; "
        "return numbers, scalar tensors or text"
    )


def line_due(record: Record, run: Record) -> bool:
    """Whether a step record is one that people are shown: every `line_every` steps, an epoch's first and last."""
    last = run["steps_per_epoch"] - 1
    return record["step"] % run["line_every"] == 0 or record["iteration"] in (0, last)


def total_steps(run: Record) -> int:
    return run["steps_per_epoch"] * run["num_epochs"]


def interval(seconds: float) -> str:
    """`MM:SS`, or `H:MM:SS` from an hour on."""
    minutes, left = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes:02d}:{left:02d}"


def eta(seconds: float) -> str:
    """`M:SS`, or `H:MM:SS` from an hour on."""
    return interval(seconds).removeprefix("0")


def number(value: Any) -> str:
    """A metric in four digits; text as it is; what was not finite as nan."""
    if value is None:
        return "nan"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def clean(text: str) -> str:
    """`text` without what would steer a terminal: a manifest, an error may come from elsewhere."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
