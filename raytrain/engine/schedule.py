"""What each step is taken with: pure functions of the step, so there is nothing to save.

The formulas are OpenPCDet's; tests/golden/schedules.json holds the tables that its code gives.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from raytrain.errors import ConfigError

SCHEDULER_OF_OPTIMIZER = {  # what `SCHEDULER: null` means, as in the heritage
    "adam": "step",
    "sgd": "step",
    "adamw": "step",
    "adam_onecycle": "onecycle",
    "adam_cosineanneal": "cosine",
}
CYCLING = ("onecycle", "cosine")  # move the momentum between MOMS


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What one step is taken with.

    momentum: beta1 of Adam or the momentum of SGD; None leaves the optimizer's as it is
    clip:     the largest L2 norm of the gradient; None: it is not clipped
    """

    lr: float
    momentum: float | None
    clip: float | None
    weight_decay: float


@dataclasses.dataclass(frozen=True)
class SchedulePhase:
    """The steps from `first_step` on, until the next phase begins; lr and momentum by steps finished in the run."""

    first_step: int
    lr: Callable[[int], float]
    momentum: Callable[[int], float | None]
    clip: float | None
    weight_decay: float


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Phases in their order, the first from step 0 on."""

    phases: tuple[SchedulePhase, ...]

    def at(self, step: int) -> StepSettings:
        """What the step after `step` finished ones is taken with."""
        index = bisect.bisect_right(self.phases, step, key=lambda phase: phase.first_step) - 1
        now = self.phases[index]
        return StepSettings(now.lr(step), now.momentum(step), now.clip, now.weight_decay)


def build_schedule(optim_cfg: Any, steps_per_epoch: int, num_epochs: int) -> Schedule:
    """The schedule that OPTIMIZATION asks for, over num_epochs * steps_per_epoch steps.

    A phase begins with each of PHASES; its curves are those of a run that had its LR from the start.
    """
    begins = [(0, optim_cfg)]
    begins += [(phase.FROM_EPOCH, optim_cfg.in_force(phase.FROM_EPOCH)) for phase in optim_cfg.PHASES]
    phases = []
    for epoch, now in begins:
        lr, momentum = curves_of(now, steps_per_epoch, num_epochs)
        phases.append(SchedulePhase(epoch * steps_per_epoch, lr, momentum, now.GRAD_NORM_CLIP, float(now.WEIGHT_DECAY)))
    return Schedule(tuple(phases))


def schedule_name(optim_cfg: Any) -> str | None:
    """Of the schedule that OPTIMIZATION asks for; None where its optimizer is unknown."""
    return optim_cfg.SCHEDULER or SCHEDULER_OF_OPTIMIZER.get(optim_cfg.OPTIMIZER)


def curves_of(
    optim_cfg: Any, steps_per_epoch: int, num_epochs: int
) -> tuple[Callable[[int], float], Callable[[int], float | None]]:
    """Learning rate and momentum that OPTIMIZATION asks for without its PHASES, by steps finished.

    onecycle and cosine cycle the momentum between MOMS whatever the optimizer. LR_WARMUP is for
    step and constant: as in the heritage the other two keep their own warm-up.
    """
    total_steps = steps_per_epoch * num_epochs
    name = schedule_name(optim_cfg)
    cycled = functools.partial(cycled_momentum, optim_cfg, total_steps)
    if name == "onecycle":
        return functools.partial(onecycle_lr, optim_cfg, total_steps), cycled
    if name == "cosine":
        return functools.partial(cosine_lr, optim_cfg, steps_per_epoch, num_epochs), cycled
    if name == "step":
        main = functools.partial(step_decay_lr, optim_cfg, steps_per_epoch)
    elif name == "constant":
        main = functools.partial(constant_lr, optim_cfg)
    else:
        raise ConfigError(
            f"OPTIMIZATION.SCHEDULER {optim_cfg.SCHEDULER!r} with OPTIMIZER {optim_cfg.OPTIMIZER!r} names no schedule; "
            f"SCHEDULER: step, onecycle, cosine, constant or null; OPTIMIZER: {', '.join(SCHEDULER_OF_OPTIMIZER)}"
        )
    if optim_cfg.LR_WARMUP:
        main = functools.partial(warmed_up_lr, optim_cfg, steps_per_epoch, main)
    return main, left_alone


def onecycle_lr(optim_cfg: Any, total_steps: int, step: int) -> float:
    """Up from LR / DIV_FACTOR to LR in the first PCT_START of the run, then down to nearly 0.

    Past total_steps the cosine comes up again, as OpenPCDet's does: no step of a run is there.
    """
    low = optim_cfg.LR / optim_cfg.DIV_FACTOR
    return _there_and_back(optim_cfg, total_steps, step, (low, optim_cfg.LR, low / 1e4))


def cycled_momentum(optim_cfg: Any, total_steps: int, step: int) -> float:
    """From MOMS[0] to MOMS[1] while the one-cycle learning rate rises, and back while it falls."""
    high, low = optim_cfg.MOMS
    return _there_and_back(optim_cfg, total_steps, step, (high, low, high))


def cosine_lr(optim_cfg: Any, steps_per_epoch: int, num_epochs: int, step: int) -> float:
    """Linear from LR / 3 to LR over WARMUP_ITER steps, then a cosine towards LR / 1000, constant in each epoch."""
    if step < optim_cfg.WARMUP_ITER:
        return float(optim_cfg.LR * (1 - (1 - step / optim_cfg.WARMUP_ITER) * (1 - 0.33333333)))
    return _cosine(optim_cfg.LR, optim_cfg.LR / 1000, (step // steps_per_epoch) / num_epochs)


def step_decay_lr(optim_cfg: Any, steps_per_epoch: int, step: int) -> float:
    """LR times LR_DECAY for each epoch of DECAY_STEP_LIST that has begun, but not below LR_CLIP."""
    num_decays = sum(step >= epoch * steps_per_epoch for epoch in optim_cfg.DECAY_STEP_LIST)
    return float(optim_cfg.LR * max(optim_cfg.LR_DECAY**num_decays, optim_cfg.LR_CLIP / optim_cfg.LR))


def constant_lr(optim_cfg: Any, step: int) -> float:
    """LR at every step."""
    return float(optim_cfg.LR)


def warmed_up_lr(optim_cfg: Any, steps_per_epoch: int, main_lr: Callable[[int], float], step: int) -> float:
    """A cosine from LR / DIV_FACTOR to LR in the first WARMUP_EPOCH epochs, then main_lr, unshifted."""
    warmup_steps = optim_cfg.WARMUP_EPOCH * steps_per_epoch
    if step >= warmup_steps:
        return main_lr(step)
    low = optim_cfg.LR / optim_cfg.DIV_FACTOR
    return float(low + (optim_cfg.LR - low) * (1 - math.cos(math.pi * step / warmup_steps)) / 2)


def left_alone(step: int) -> None:
    """No momentum of the schedule's own: the optimizer's stays."""


def _there_and_back(optim_cfg: Any, total_steps: int, step: int, values: tuple[float, float, float]) -> float:
    """Cosine from values[0] to values[1] until the peak of the cycle, then on to values[2]."""
    start, peak, end = values
    peak_step = int(optim_cfg.PCT_START * total_steps)  # 0 in a very short run: it begins at the peak
    if step < peak_step:
        return _cosine(start, peak, step / peak_step)
    return _cosine(peak, end, (step - peak_step) / (total_steps - peak_step))


def _cosine(start: float, end: float, share: float) -> float:
    """Half a cosine: `start` at share 0, `end` at share 1."""
    return float(end + (start - end) / 2 * (1 + math.cos(math.pi * share)))
