"""What a task has built, in short: to be compared between the processes of a run, and with a checkpoint's.

A record holds `hash_seed`, `num_samples` of each split, `names` (lists of texts, numbers by name: class names, above
all), `arrays` of task and model, and `samples`: what a few of them are, by hash. A checkpoint's manifest has it under
`built`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from raytrain.batch import entries_of, is_plain
from raytrain.data.feed import Feed
from raytrain.data.loader import BatchKey
from raytrain.data.sampler import cut
from raytrain.engine.attributes import array_digests
from raytrain.engine.own_state import datasets_in, has_state
from raytrain.engine.world import World
from raytrain.errors import CollateError, TaskError, listed
from raytrain.hash_seed import FIXED, RANDOM, VARIABLE, hash_seed
from raytrain.task import Task

MAX_NAMES = 100_000  # of a list: 10 ms
CAUSES = "Likely another order of a set or of os.listdir (sort it), other files, or a generator without a seed"
Record = dict[str, Any]


def record_of(datasets: dict[str, Any]) -> Record:
    """Of the data sets, to begin with: without names and arrays, which a model may bring, and without samples."""
    num_samples = {split: len(dataset) for split, dataset in datasets.items()}
    return {"hash_seed": hash_seed(), "num_samples": num_samples}


def check_on_all_ranks(record: Record, world: World) -> list[str]:
    """Collective. Lines on what other ranks have built otherwise than rank 0; TaskError where it is another length."""
    first, *others = world.all_objects(record)
    ranks_by_line: dict[str, list[int]] = {}
    for rank, other in enumerate(others, start=1):
        if other.get("num_samples") != first.get("num_samples"):
            raise TaskError(
                f"build_dataset gave {counted(other)} on rank {rank} and {counted(first)} on rank 0, so the ranks "
                "would take other samples, and wait for each other for ever. What it counts (files that are found, "
                "a random split) must be the same in each process: give them the same files, sort, seed"
            )
        different = differences(first, other)
        if different:
            ranks_by_line.setdefault("; ".join(different), []).append(rank)
    return [
        f"built otherwise than on rank 0, on rank {', '.join(map(str, ranks))}: {line}. {CAUSES}"
        for line, ranks in ranks_by_line.items()
    ]


def compare_with_checkpoint(old: Record, new: Record) -> list[str]:
    """One line on what is not as it was when the checkpoint was made; [] where all is, or it has no such record."""
    different = differences(old, new)
    for split, number in new.get("num_samples", {}).items():
        before = old.get("num_samples", {}).get(split, number)
        if split != "train" and before != number:  # a training split of another length is refused elsewhere
            different.append(f"{split} has {number} samples, and had {before}")
    if not different:
        return []
    return [f"not as it was when the checkpoint was made: {'; '.join(different)}. {CAUSES}"]


def compare_loader_workers(of_one: Record, of_another: Record) -> list[str]:
    """One line if two loader workers have made another sample of the same: it depends on who makes it."""
    different = differences({"samples": of_one}, {"samples": of_another})
    if not different:
        return []
    return [
        f"one loader worker and another do not make the same: {'; '.join(different)}. So training depends on how many "
        "there are. Likely a seed that is the number of the loader worker (get_worker_info()) or of its process; "
        "raytrain seeds each sample itself"
    ]


def differences(old: Record, new: Record) -> list[str]:
    """What both records hold and is not the same in them, in words."""
    lines = []
    names = [n for n, value in new.get("names", {}).items() if old.get("names", {}).get(n, value) != value]
    if names:
        lines.append(f"other names, or in another order, in {listed(names)}")
    arrays = [n for n, value in new.get("arrays", {}).items() if old.get("arrays", {}).get(n, value) != value]
    if arrays:
        lines.append(f"other numbers in {listed(arrays)}")
    for which, fields in new.get("samples", {}).items():
        was = old.get("samples", {}).get(which)
        changed = [] if was is None else [field for field in {**was, **fields} if was.get(field) != fields.get(field)]
        if changed:
            lines.append(f"{which} hold other values{f' in {listed(changed)}' if changed != [''] else ''}")
    before, now = old.get("hash_seed"), new.get("hash_seed")
    if before is not None and now is not None and (before != now or (now == RANDOM and lines)):
        is_not = "drawn at random" if before == now else f"{now}, not {before}"
        remedy = f"start with {VARIABLE}={before}" if before != RANDOM else f"always start with {VARIABLE}={FIXED}"
        lines.insert(0, f"the hash seed, by which sets are ordered, is {is_not} ({remedy})")
    return lines


def counted(record: Record) -> str:
    return " and ".join(f"{number} samples of {split}" for split, number in record["num_samples"].items())


def names_of(task: Task, datasets: dict[str, Any]) -> dict[str, str]:
    """Hashes of lists of names, and of numbers by name, by where they are: the task, its module, its data sets."""
    module = sys.modules[type(task).__module__]
    places = {module.__name__: module, type(task).__name__: task}
    for split, dataset in datasets.items():
        places.update(datasets_in(dataset, split))
    return {
        f"{where}.{name}": hashed(repr(value if isinstance(value, (list, tuple)) else sorted(value.items())).encode())
        for where, place in places.items()
        for name, value in list(getattr(place, "__dict__", {}).items())
        if are_names(value)
    }


def arrays_of(task: Task, model: torch.nn.Module, datasets: dict[str, Any]) -> dict[str, str]:
    """Hashes of what task and model hold in arrays besides parameters and buffers (anchors, a fixed projection).

    Not of a task that has a state, which gives them back.
    """
    roots = {} if has_state(task) else {type(task).__name__: task}
    return array_digests(model, roots, known=datasets.values())


def are_names(value: Any) -> bool:
    """Whether it may be class names, or their numbers; not where files lie, which may differ from host to host."""
    if isinstance(value, Mapping):
        known = 0 < len(value) <= MAX_NAMES and all(type(k) is str and type(v) is int for k, v in value.items())
        return known and not any(map(is_path, value))
    if not isinstance(value, (list, tuple)) or not 0 < len(value) <= MAX_NAMES:
        return False
    return all(type(each) is str and not is_path(each) for each in value)


def is_path(text: str) -> bool:
    return text.startswith(("/", "~")) or "://" in text or ":\\" in text


def probe_keys(num_samples: int, batch_size: int) -> list[BatchKey]:
    """Of the first, the middle and the last sample of the training split: as training asks for them in epoch 0."""
    ids = sorted({0, num_samples // 2, num_samples - 1})
    return [BatchKey("train", 0, each) for each in cut(ids, batch_size)]


def samples_in(feed: Feed, keys: list[BatchKey]) -> dict[str, dict[str, str]]:
    """Hashes of what the batches of `keys` hold, by field: the first that the feed gives."""
    found = {}
    for key in keys:
        ids = ", ".join(map(str, key.ids))
        which = f"sample{'s' * (len(key.ids) > 1)} {ids} of {key.split}"
        try:
            batch = feed.host_batch(key)
        except CollateError:  # it may want pairs, or like samples in a row; else the first true batch fails too
            continue
        hashes = {field: hash_of(value) for field, value in fields_of(batch)}
        found[which] = {field: value for field, value in hashes.items() if value is not None}
    return found


def fields_of(batch: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What a batch holds, by how it is reached: ("image", tensor), ("boxes.0.label", 3)."""
    entries = entries_of(batch)
    if entries is None:
        yield path, batch
        return
    for key, value in entries.items():
        yield from fields_of(value, f"{path}.{key}" if path else str(key))


def hash_of(value: Any) -> str | None:
    """Of a value to the bit; None of one whose content cannot be seen."""
    if isinstance(value, torch.Tensor):
        if not is_plain(value):
            return None
        content = value.detach().cpu().contiguous()
        return hashed(content.reshape(-1).view(torch.uint8).numpy(), f"{tuple(content.shape)} {content.dtype}")
    if isinstance(value, np.ndarray) and value.dtype.kind != "O":
        return hashed(np.ascontiguousarray(value).view(np.uint8).data, f"{value.shape} {value.dtype}")
    if isinstance(value, (str, bytes, int, float, complex, np.generic, type(None))):
        return hashed(repr(value).encode())
    return None


def hashed(content: Any, kind: str = "") -> str:
    found = hashlib.blake2b(kind.encode(), digest_size=8)
    found.update(content)
    return found.hexdigest()
