"""How often the workers of a run are started again: as long as it makes progress between its failures."""

from __future__ import annotations

import dataclasses

MAX_DEATHS = 2  # restarts without a new step, unless SCALE.MAX_FAILURES says otherwise: a third death is the last


@dataclasses.dataclass
class RestartBudget:
    """Counts failures in a row that came without a new step between them.

    max_failures: SCALE.MAX_FAILURES: restarts without a new step, -1 for any number. None: MAX_DEATHS of them where a
                  process has died, none where the task's own code has raised: it would again
    last_failed_step: the last step in which any attempt has failed, from 1; 0 before the first
    """

    max_failures: int | None
    last_failed_step: int = -1
    in_a_row: int = 0

    def allows(self, step: int, raised: bool) -> bool:
        """Whether the workers are to be started again after this failure, in `step`; `raised` by the task's code."""
        self.in_a_row = self.in_a_row + 1 if step <= self.last_failed_step else 1
        self.last_failed_step = max(step, self.last_failed_step)
        limit = self.limit(raised)
        return limit == -1 or self.in_a_row <= limit

    def limit(self, raised: bool) -> int:
        if self.max_failures is not None:
            return self.max_failures
        return 0 if raised else MAX_DEATHS

    def why_not(self, raised: bool) -> str:
        """For the user, after `allows` has said no: why the workers are not started again, and what to do."""
        if self.limit(raised) == 0:
            return ""
        place = f"step {self.last_failed_step}" if self.last_failed_step > 0 else "the start"
        return (
            f"It failed {self.in_a_row} times in a row without getting beyond {place}, so it was given up:\n"
            "what fails again and again is no accident. Once it is mended the same command goes on from the newest\n"
            "checkpoint. SCALE.MAX_FAILURES sets how often a run does so by itself (-1: without end)."
        )
