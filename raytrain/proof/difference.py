"""The first thing that is not the same in two trials of one run, found in their traces."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from raytrain.proof.held import Change, changes

Trace = Mapping[str, Any]  # as JSON gives it back: keys are texts


@dataclasses.dataclass(frozen=True)
class Difference:
    """What differs first.

    kind:    failure, samples, weights, batch, loss, gradient or buffer
    step:    in which it shows, from 1; 0 where a trial begins
    what:    it, in words
    changes: of what task, data set and model hold, what is not the same there
    """

    kind: str
    step: int
    what: str
    changes: Sequence[Change] = ()


def first_difference(straight: Trace, others: Sequence[Trace], loads_elsewhere: bool = False) -> Difference | None:
    """others: by rank, the processes of the trial that is compared; it may begin later

    loads_elsewhere: whether it has loader workers, so that its data set stays what it was in the training process
    """
    found = difference_of(straight, others)
    if found is None or not loads_elsewhere:
        return found
    moving = {change.name for change in changes(straight["held"].get("1", {}), straight["held"].get("2", {}))}
    return dataclasses.replace(found, changes=[change for change in found.changes if change.name in moving])


def difference_of(straight: Trace, others: Sequence[Trace]) -> Difference | None:
    failed = [other for other in others if "failed" in other]
    if failed:
        told = next((other for other in failed if not other["follows"]), failed[0])
        return Difference("failure", 0, told["failed"])
    first = others[0]
    if first["num_samples"] != straight["num_samples"]:
        return Difference(
            "samples", 0, f"{straight['num_samples']} samples to train on straight, {first['num_samples']} here"
        )
    began = min(map(int, first["weights"]))
    for mark in sorted(map(int, first["weights"])):
        for step in range(began + 1, mark + 1):
            found = in_step(straight["steps"][str(step)], [other["steps"][str(step)] for other in others])
            if found is not None:
                return Difference(found[0], step, found[1], changes_at(step, began, straight, others))
        began = max(began, mark)
        tensor = first_key(straight["weights"][str(mark)], first["weights"][str(mark)])
        if tensor is not None:
            at = "as the run begins" if mark == 0 else f"after step {mark}"
            return Difference("weights", mark, f"{tensor} {at}", changes_at(mark + 1, mark, straight, others))
    return None


def in_step(straight: Trace, others: Sequence[Trace]) -> tuple[str, str] | None:
    """Kind and words of what differs first in a step: batches, before losses, gradients, and what it leaves."""
    batches = sorted((batch for other in others for batch in other["batches"]), key=place_of)
    for before, now in zip(sorted(straight["batches"], key=place_of), batches, strict=True):
        found = in_batch(before, now)
        if found is not None:
            return "batch", found
    losses = sorted((loss for other in others for loss in other["losses"]), key=place_of)
    for before, now, batch in zip(sorted(straight["losses"], key=place_of), losses, batches, strict=True):
        if before["loss"] != now["loss"]:
            values = f"{float.fromhex(before['loss']):.9g} straight, {float.fromhex(now['loss']):.9g} here"
            return "loss", f"the loss of virtual worker {now['virtual_worker']} ({values}; {ids_of(batch)})"
    gradients = {v: named for other in others for v, named in other["gradients"].items()}
    for v, named in straight["gradients"].items():
        name = first_key(named, gradients.get(v, {}))
        if name is not None:
            return "gradient", f"the gradient of {name} on virtual worker {v}, where the loss is the same"
    name = first_key(straight["buffers"], others[0]["buffers"])
    return None if name is None else ("buffer", f"what the step leaves in {name}")


def in_batch(before: Trace, now: Trace) -> str | None:
    """Which sample's bytes differ, in which field."""
    if before["ids"] != now["ids"]:
        return f"the order of samples: {ids_of(before)} straight, {ids_of(now)} here"
    field = first_key(before["fields"], now["fields"])
    if field is None:
        return None
    where = f"field {field!r}, " if field else ""
    one, other = before["fields"].get(field), now["fields"].get(field)
    epoch = f"epoch {now['epoch']}"
    if isinstance(one, list) and isinstance(other, list):
        [position, *_] = [i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]]
        return f"sample {now['ids'][position]} of the training split ({where}{epoch})"
    return f"the batch of {ids_of(now)} of the training split ({where}{epoch})"


def changes_at(step: int, began: int, straight: Trace, others: Sequence[Trace]) -> list[Change]:
    """Of what is held, what differed before that step began; if nothing did, what differs after it.

    Of a data set only what differs after it too: what set_epoch sets is not there yet in one that was just made.
    """
    common = sorted({int(mark) for mark in straight["held"]} & {int(mark) for mark in others[0]["held"]})
    before = [mark for mark in common if began <= mark < step]
    after = next((mark for mark in common if mark >= step), None)
    of_data = f"{straight['classes']['data']}."
    for other in others:
        then = [] if after is None else changed_at(after, straight, other)
        still = {change.name for change in then}
        for mark in reversed(before):
            first = changed_at(mark, straight, other)
            first = [change for change in first if change.name in still or not change.name.startswith(of_data)]
            if first:
                return first
        if then:
            return then
    return []


def changed_at(mark: int, straight: Trace, other: Trace) -> list[Change]:
    return changes(straight["held"][str(mark)], other["held"][str(mark)])


def place_of(entry: Trace) -> int:
    """Of a micro-batch; those of one virtual worker come in their order."""
    return int(entry["virtual_worker"])


def ids_of(batch: Trace) -> str:
    ids = batch["ids"]
    shown = ", ".join(map(str, ids[:6])) + (f" and {len(ids) - 6} more" if len(ids) > 6 else "")
    return f"sample{'s' * (len(ids) > 1)} {shown}"


def first_key(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first that is not in both with the same value."""
    return next((key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)), None)
