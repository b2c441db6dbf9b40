"""Which steps must not change the weights: a loss or gradient that is not finite, or far above the usual.

One such step ruins weights, moments and BatchNorm's statistics for good. Every rank judges the same summed
numbers, so all come to the same verdict without a word; what a GPU says is read two steps late, without waiting.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from raytrain.engine.buffers import copy_fitting, fits
from raytrain.engine.late import LATE_STEPS, LateReader

KINDS = ("", "spike", "nonfinite")  # verdicts, in the order of their numbers; 0: nothing is wrong
SPIKE, NONFINITE = 1, 2


@dataclasses.dataclass(frozen=True)
class BadStep:
    """A step that changed nothing, as one rank knows it.

    kind:            "nonfinite" or "spike"
    ago:             how many steps before the one that has just been taken
    in_a_row:        so many such steps, this one included
    loss, grad_norm: of the step, over all ranks
    loss_here:       this rank's part of the loss
    parameters:      names of those whose gradient is not finite: on this rank, or if ago > 0 in the sum over all
                     (there those too that lie within 4096 numbers of one that is not)
    rolled_back_to:  the step whose weights the run went back to, where that is asked for
    """

    kind: str
    ago: int
    in_a_row: int
    loss: float
    grad_norm: float
    loss_here: float
    parameters: list[str]
    rolled_back_to: int | None = None

    @property
    def here(self) -> bool:
        """Whether numbers of this very rank are not finite."""
        return (self.ago == 0 and bool(self.parameters)) or not math.isfinite(self.loss_here)


class Guard:
    """The verdict on each step, what OPTIMIZATION says is done about a bad one, and the state to go back to.

    actions:        by kind: "skip", "rollback" or "stop"
    limit:          so many bad steps in a row end the run
    rollback_every: steps between the states that a rollback goes back to (anchors); None: it never does
    scaled:         fp16: gradients overflow as a matter of course, and the loss scaler answers that

    All that a resumed run needs of it are tensors, which change in place.
    """

    def __init__(self, optim_cfg: Any, device: torch.device, scaled: bool) -> None:
        spike = optim_cfg.SPIKE
        self.actions = {"nonfinite": optim_cfg.NONFINITE} | ({"spike": spike.ACTION} if spike else {})
        self.limit: int = optim_cfg.NONFINITE_LIMIT
        self.rollback_every = optim_cfg.ROLLBACK_EVERY if "rollback" in self.actions.values() else None
        self.scaled = scaled
        self.in_a_row = torch.zeros((), device=device)
        self._calm = False  # whether in_a_row is known to be 0
        self.unread = torch.zeros(LATE_STEPS, 5, device=device)  # verdicts of the last steps, where they come late
        self.window: torch.Tensor | None = None
        if spike is not None:  # loss and norm of the last good steps, newest last; NaN: there were not so many yet
            self.factor = float(spike.FACTOR)
            self.window = torch.full((2, spike.WINDOW), math.nan, device=device)
        self.anchor: dict[str, torch.Tensor] = {}
        self.anchor_step = torch.zeros((), dtype=torch.int64)

    def read(self, loss: torch.Tensor, norm: torch.Tensor) -> int:
        """What is wrong with a step of this loss and gradient norm, an index of KINDS. Waits for their device."""
        if self.window is not None:
            return int(self.judge(loss, norm))
        finite = math.isfinite(loss.item()) and (self.scaled or math.isfinite(norm.item()))
        if not finite:
            self.in_a_row.add_(1)
        elif not self._calm:
            self.in_a_row.zero_()
        self._calm = finite
        return 0 if finite else NONFINITE

    def judge(self, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """What `read` says, a f32 scalar on the device, without waiting for it."""
        judged = loss if self.scaled else loss + norm
        verdict = (judged * 0 != 0).float() * NONFINITE  # infinities and NaN times 0 are NaN
        if self.window is not None:
            verdict = self._with_spikes(self.window, verdict, torch.stack([loss.float(), norm.float()]))
        self.in_a_row.add_(1).mul_(verdict > 0)
        return verdict

    def _with_spikes(self, window: torch.Tensor, verdict: torch.Tensor, latest: torch.Tensor) -> torch.Tensor:
        """Also a loss or norm far above its median; what is neither comes into the window. latest: (2,)"""
        if self.scaled:  # an overflow is no spike and no usual norm
            latest = torch.where(latest * 0 == 0, latest, math.nan)
        ordered = window.sort(dim=1).values  # NaN last
        medians = ordered[:, (window.shape[1] - 1) // 2]
        # By distance, so that a negative loss has spikes too; NaN while the window is not full.
        limits = medians + (self.factor - 1) * medians.abs() + 0 * ordered[:, -1]
        high = (latest > limits) & (medians != 0)  # a median of 0 says nothing of what is usual
        verdict = torch.maximum(verdict, high.any() * float(SPIKE))
        left_out = verdict > 0
        if self.scaled:
            left_out = left_out | latest.isnan().any()
        torch.where(left_out, window, torch.cat([window[:, 1:], latest[:, None]], dim=1), out=window)
        return verdict

    def why_end(self, bad_step: BadStep) -> str | None:
        """What ends the run with this step; None if it goes on."""
        key = "NONFINITE" if bad_step.kind == "nonfinite" else "SPIKE.ACTION"
        if self.actions[bad_step.kind] == "stop":
            return f"OPTIMIZATION.{key} is stop, so the run ends here"
        if bad_step.in_a_row >= self.limit:
            return f"The run ends: {self.limit} such steps in a row are too many (OPTIMIZATION.NONFINITE_LIMIT)"
        return None

    def takes_again(self, bad_step: BadStep) -> bool:
        """Whether a run that ends with this step ends before it, and begins with it when it goes on."""
        return self.actions[bad_step.kind] == "stop" and bad_step.ago == 0

    def anchor_due(self, step: int) -> bool:
        """Whether the state after `step` steps is one to go back to."""
        return self.rollback_every is not None and (step % self.rollback_every == 0 or not self.anchor)

    def drop_anchor(self, step: int, live: Mapping[str, torch.Tensor]) -> None:
        """`live`, as it is after `step` steps, is what a rollback goes back to."""
        before = self.anchor
        self.anchor = {n: before[n] if fits(t, before.get(n)) else torch.empty_like(t) for n, t in live.items()}
        copy_fitting(self.anchor, live)
        self.anchor_step.fill_(step)

    def roll_back(self, live: Mapping[str, torch.Tensor]) -> None:
        """`live` becomes what it was at the anchor; moments that did not exist then become zero, as they began."""
        copy_fitting(live, self.anchor)
        for name, tensor in live.items():
            if name.startswith("moments.") and name not in self.anchor:
                tensor.zero_()

    def state(self) -> dict[str, Any]:
        """For a checkpoint; the tensors live on."""
        state: dict[str, Any] = {"in_a_row": self.in_a_row, "unread": self.unread}
        if self.window is not None:
            state["window"] = self.window
        if self.rollback_every is not None:
            state |= {"anchor": self.anchor, "anchor_step": self.anchor_step}
        return state

    def load(self, state: Mapping[str, Any], live: Mapping[str, torch.Tensor]) -> None:
        """Take over what fits of a `state`; an anchor of another model than `live` is not."""
        self._calm = False
        own = {name: tensor for name, tensor in self.state().items() if name != "anchor"}
        copy_fitting(own, {name: state[name].to(tensor.device) for name, tensor in own.items() if name in state})
        anchor = {name: tensor.to(self.in_a_row.device) for name, tensor in state.get("anchor", {}).items()}
        weights = {name: tensor for name, tensor in live.items() if name.startswith("params.")}
        whole = all(fits(tensor, anchor.get(name)) for name, tensor in weights.items())
        self.anchor = {n: t.clone() for n, t in anchor.items()} if whole and self.rollback_every is not None else {}


class LateVerdicts:
    """A guard's verdicts on their way to the host, which hears of each LATE_STEPS after its step."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._reader = LateReader(guard.unread.tolist())
        self._row_norms: deque[list[torch.Tensor]] = deque(maxlen=LATE_STEPS + 1)

    def swap(
        self, numbers: torch.Tensor, row_norms: list[torch.Tensor]
    ) -> tuple[list[float], list[torch.Tensor] | None] | None:
        """Puts this step's in; what was put in LATE_STEPS ago if that step was bad, else None.

        numbers:   (5,) f32: verdict, bad steps in a row, loss, norm, this rank's part of the loss
        row_norms: the stepper's; those of a step before a resume are not known any more
        """
        unread = self._guard.unread
        if self._guard.rollback_every is not None:  # a run that is resumed in between must hear of it too
            unread.copy_(torch.cat([unread[1:], numbers[None]]))
        late = self._reader.swap(numbers)
        self._row_norms.append(row_norms)
        if late is None or not late[0]:
            return None
        return late, self._row_norms[0] if len(self._row_norms) > LATE_STEPS else None


def is_finite(gradient: torch.Tensor | None) -> bool:
    """True if there is no NaN and no infinity in it. Waits for its device."""
    if gradient is None:
        return True
    values = gradient if gradient.layout is torch.strided else gradient.to_dense()
    return bool(values.isfinite().all())
