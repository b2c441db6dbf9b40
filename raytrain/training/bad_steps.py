"""What is told of a step whose numbers were bad: which ranks, parameters and samples it came from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from raytrain.data.feed import Step
from raytrain.engine.guard import BadStep, is_finite
from raytrain.engine.state import RunState
from raytrain.errors import listed
from raytrain.journal.journal import Journal
from raytrain.training.contract import Part

SHOWN = 5  # parameters of an event
SAMPLES_SHOWN = 24


def suspects(bad_step: BadStep, taken: Sequence[Step], parts: Mapping[int, Sequence[Part]]) -> list[int]:
    """Ids of this rank's samples of a bad step: of its micro-batches whose loss is not finite, else of all.

    taken: the steps up to now;  parts: of the last one, by virtual worker
    """
    if bad_step.ago >= len(taken):  # it was taken in another epoch, or before the run was resumed
        return []
    keys = [key for of_worker in taken[-1 - bad_step.ago].micro_batches.values() for key in of_worker]
    bad = []
    if bad_step.ago == 0:
        taken_parts = itertools.chain(*parts.values())
        bad = [key for key, each in zip(keys, taken_parts, strict=True) if not is_finite(each.loss.detach())]
    return [sample for key in bad or keys for sample in key.ids]


def answer(run: RunState, journal: Journal, bad_step: BadStep, samples: list[int]) -> str | None:
    """Collective. Tell of a bad step, which has changed nothing, or after which the engine has rolled back.

    Returns what happened and why that ends the run, None if it goes on.

    samples: ids of those on this rank that it may come from
    """
    guard, step = run.engine.guard, run.progress.step - bad_step.ago
    everyone = run.world.all_objects((bad_step, samples))
    ranks = culprits([each for each, _ in everyone])
    parameters = list(dict.fromkeys(name for rank in ranks for name in everyone[rank][0].parameters))
    ids = [sample for rank in ranks for sample in everyone[rank][1]]
    what = described(step, bad_step, ranks, parameters, ids)
    if math.isnan(bad_step.loss) and all(math.isfinite(each.loss_here) for each, _ in everyone):
        nothing = "the weights of its micro-batches (ModelReturn) add up to nothing: 0, or one is negative"
        what = f"step {step}: {nothing} ({of_samples(ids)})"
    message = f"{what}: it changed nothing"
    if bad_step.rolled_back_to is not None:
        message += f", and the run went back to the weights of step {bad_step.rolled_back_to}"
    if bad_step.in_a_row > 1:
        message += f"; {bad_step.in_a_row} such steps in a row"
    journal.write(
        "event",
        event=bad_step.kind,
        step=step,
        ranks=ranks,
        parameters=parameters[:SHOWN],
        samples=ids[:SAMPLES_SHOWN],
        action=guard.actions[bad_step.kind],
        in_a_row=bad_step.in_a_row,
        loss=bad_step.loss,
        grad_norm=bad_step.grad_norm,
        message=message,
    )
    reason = guard.why_end(bad_step)
    return None if reason is None else f"{message}. {reason}"


def culprits(bad_steps: Sequence[BadStep]) -> list[int]:
    """The ranks that a bad step comes from, by what each rank tells of it; all, where it shows in the sum alone."""
    if bad_steps[0].kind == "spike":
        return [max(range(len(bad_steps)), key=lambda rank: bad_steps[rank].loss_here)]
    return [rank for rank, bad_step in enumerate(bad_steps) if bad_step.here] or list(range(len(bad_steps)))


def described(step: int, bad_step: BadStep, ranks: Sequence[int], parameters: Sequence[str], ids: Sequence[int]) -> str:
    """A bad step, in words."""
    if bad_step.kind == "spike":
        what = f"the loss is {bad_step.loss:.4g} and the gradient's norm {bad_step.grad_norm:.4g}, far above the usual"
    elif math.isfinite(bad_step.loss):
        what = f"the gradient's norm is {bad_step.grad_norm}"
    else:
        what = f"the loss is {bad_step.loss}"
    where = [f"rank {', '.join(map(str, ranks))}"]
    if parameters:
        where.append(f"first in the gradient of {listed(parameters, SHOWN)}")
    if ids:
        where.append(of_samples(ids))
    return f"step {step}: {what} ({'; '.join(where)})"


def of_samples(ids: Sequence[int]) -> str:
    """`samples 3, 4, 5`, not too many of them."""
    return f"samples {listed(ids, SAMPLES_SHOWN)}"
