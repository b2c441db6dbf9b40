"""Where a run stands, and how far it has to go: pure numbers."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, order=True)
class Progress:
    """Position of a run. Everything that resumes or resizes is a function of it.

    epoch:  finished epochs (the epoch under way, counted from 0)
    cursor: samples of this epoch's order consumed so far, over all virtual workers
    step:   finished optimizer steps
    """

    epoch: int = 0
    cursor: int = 0
    step: int = 0


@dataclasses.dataclass(frozen=True)
class TaskProgress:
    """Where a run stands, as a task reads it: `self.progress`. A function of config and step, so a resume keeps it.

    epoch: finished epochs: that of a training batch, counted from 0; in an evaluation, how many were trained
    step:  finished optimizer steps
    share: of the run's samples that are consumed, 0 to 1
    """

    epoch: int
    step: int
    share: float


AT_START = TaskProgress(0, 0, 0.0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a data set is cut into steps.

    A step takes `accumulate` micro-batches of `batch_size` samples from each of
    `virtual_workers`; the last step of an epoch takes what is left.

    last: what becomes of the last micro-batches where they are not whole: "keep", "drop" or "pad" (LOADER.LAST)
    """

    num_samples: int
    batch_size: int
    virtual_workers: int
    accumulate: int
    num_epochs: int
    last: str = "keep"

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * self.virtual_workers * self.accumulate

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.taken(0) / self.samples_per_step)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.num_epochs

    def taken(self, cursor: int) -> int:
        """Samples that an epoch takes from `cursor` on: as many of each virtual worker, some of them again or left out.

        "keep" fills up to equal shares, as DistributedSampler does, "pad" to whole micro-batches.
        """
        left = max(0, self.num_samples - cursor)
        unit = self.virtual_workers * (1 if self.last == "keep" else self.batch_size)
        return left // unit * unit if self.last == "drop" else math.ceil(left / unit) * unit

    @property
    def smallest_batch(self) -> int:
        """Samples of the smallest micro-batch."""
        return self.taken(0) // self.virtual_workers % self.batch_size or self.batch_size

    def advanced(self, progress: Progress, consumed: int) -> Progress:
        """Progress after one step that consumed `consumed` samples over all virtual workers."""
        cursor = progress.cursor + consumed
        if self.taken(cursor) == 0:
            # Equal to step + 1 unless the plan changed in mid-epoch (--allow-config-change).
            return Progress(progress.epoch + 1, 0, (progress.epoch + 1) * self.steps_per_epoch)
        return Progress(progress.epoch, cursor, progress.step + 1)

    def converted(self, epoch: int, cursor: int) -> Progress:
        """The same place in the data under this plan, for a run whose plan was changed."""
        if self.taken(cursor) == 0:  # the data set has shrunk: nothing of this epoch is left
            epoch, cursor = epoch + 1, 0
        return Progress(epoch, cursor, epoch * self.steps_per_epoch + cursor // self.samples_per_step)

    def standing(self, progress: Progress) -> TaskProgress:
        """What a task is told of `progress`."""
        consumed = progress.epoch * self.num_samples + progress.cursor
        share = min(1.0, consumed / (self.num_epochs * self.num_samples))
        return TaskProgress(progress.epoch, progress.step, share)

    def finished(self, progress: Progress) -> bool:
        return progress.epoch >= self.num_epochs
