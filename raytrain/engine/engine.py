"""What happens to gradients: combined over the virtual workers, clipped, stepped.

The loop hands losses in and gets a step out; how gradients travel is engine/gradients.py's.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from raytrain.engine.buffers import ModuleBuffers
from raytrain.engine.flat import FlatStepper
from raytrain.engine.gradients import Gradients
from raytrain.engine.guard import KINDS, BadStep, Guard, LateVerdicts, is_finite
from raytrain.engine.late import LATE_STEPS
from raytrain.engine.layout import why_not_flat
from raytrain.engine.optim import optimizer_options, stepped_groups
from raytrain.engine.overlap import SEGMENT_BYTES
from raytrain.engine.per_parameter import TorchStepper
from raytrain.engine.precision import Precision
from raytrain.engine.randomness import torch_random_state
from raytrain.engine.reduction import Reduction
from raytrain.engine.schedule import StepSettings
from raytrain.engine.stepper import Stepper
from raytrain.engine.tail import Combined, LeafLoss
from raytrain.engine.terms import Key, Sum, Value, means_of, refuse_mixture
from raytrain.engine.world import World
from raytrain.errors import TaskError


@dataclasses.dataclass(frozen=True)
class Stepped:
    """What one step leaves behind: device scalars, not yet read, and what the ranks agreed on.

    loss:      mean over all micro-batches of all virtual workers, each by its share or weight
    grad_norm: L2 over the stepped parameters, before clipping
    wishes:    for each wish of `Engine.step`, whether some rank had it
    terms:     the means of what is recorded beside the loss, alike; None if `step` was given none
    bad_step:  the step that changed nothing since its numbers were bad, if one is known now: this one, on a GPU
               the one of two steps ago
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    wishes: tuple[bool, ...]
    terms: dict[Key, Value] | None
    bad_step: BadStep | None


class Engine:
    """Gradients of all virtual workers -> one optimizer step, the same on every process.

    In a step the gradients are combined over the processes (engine/gradients.py), and with them the loss, the ranks'
    wishes (stop, save) and the model's buffers; the norm is taken; the guard judges; the stepper steps. A step whose
    loss or gradient is not finite, or a spike, changes nothing: no weight, moment, step count or buffer.

    why_ddp: if OPTIMIZATION.ENGINE is auto and flat buffers cannot hold the model, what keeps it out
    beat:    told what this rank is at, by the names of keeper.heartbeat.PHASES
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optim_cfg: Any,
        world: World,
        reduction: str = "auto",
        is_exact: bool = True,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """Collective. `reduction` is SCALE.REDUCTION; larger gradients than segment_bytes are summed in parts.

        is_exact: whether virtual workers are added up in the one order of engine/tree.py
        """
        self.model, self.world, self.is_exact = model, world, is_exact
        self.beat: Callable[[str], None] = lambda phase: None
        self.precision = Precision(optim_cfg, world.device)
        groups, options = stepped_groups(model, optim_cfg), optimizer_options(optim_cfg)
        self.params = [p for group in groups for p in group]
        self.num_moments = options.num_moments
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self._known = set(self.trainable)
        self._names = {p: name for name, p in model.named_parameters()}
        self.stepped_names = [self._names[p] for p in self.params]
        scaler = self.precision.scaler
        self.why_ddp = None
        if optim_cfg.ENGINE != "ddp":
            self.why_ddp = why_not_flat(model, self.params, scaled=scaler.is_enabled())
            if self.why_ddp and optim_cfg.ENGINE == "flat":
                raise TaskError(f"OPTIMIZATION.ENGINE is flat, but {self.why_ddp}; set it to auto or ddp")
        flat = optim_cfg.ENGINE != "ddp" and self.why_ddp is None
        has_several = world.virtual_workers > 1
        self.buffers = ModuleBuffers(model, have_means=optim_cfg.BUFFERS == "mean" and has_several)
        self.gradients: Gradients | None = None
        if flat or world.size > 1 or (has_several and (is_exact or self.buffers.means is not None)):
            self.gradients = Gradients(model, self.params, self.buffers, world, reduction, is_exact, segment_bytes)
        self.stepper: Stepper
        if flat and self.gradients is not None:
            layout, sums = self.gradients.layout, self.gradients.reduction.sums
            self.stepper = FlatStepper(groups, options, layout, sums, self._names)
        else:
            fused = world.device.type == "cuda" and all(p.is_floating_point() for p in self.params)
            sums_of_params = self.gradients.sums() if self.gradients else None
            self.stepper = TorchStepper(groups, options, scaler, sums_of_params, fused)
        self.guard = Guard(optim_cfg, world.device, scaled=scaler.is_enabled())
        self.reads_late = world.device.type != "cpu"  # whether reading a verdict at once would wait for the device
        self._late_verdicts = LateVerdicts(self.guard)
        self.readers_done: torch.cuda.Event | None = None  # of what reads the parameters beside the computation
        self.loss_sum: torch.Tensor | None = None  # of the virtual worker under way
        self.weight_sum: torch.Tensor | None = None
        self._losses: list[LeafLoss] = []  # of those that are through
        self.may_join = True  # whether two may be added in `.grad`, which one who looks at each there would not want
        self.is_weighted: bool | None = None  # whether micro-batches have weights; None: none has come yet
        self._weights_agree = world.size == 1
        self.newly_followed: list[str] = []  # parameters that have just been found to be changed by forward
        self.backward_draws: bool | None = None  # whether the first backward pass drew random numbers

    def _wait_for_readers(self) -> None:
        """What a GPU does from here on comes after the copy of the state that is being made beside it, if one is."""
        if self.readers_done is not None:
            torch.cuda.current_stream().wait_event(self.readers_done)
            self.readers_done = None

    def begin_step(self, at: int) -> None:
        """No gradient is left; what a rollback returns to is kept, where that is due after `at` steps."""
        if self.guard.anchor_due(at):
            self.drop_anchor(at)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients of every parameter, stepped or not (the heritage forgets only those it steps)."""
        self._forget_gradients()
        self._losses = []
        self.buffers.begin_step()
        if self.gradients is not None:
            self.gradients.begin_step()

    @contextmanager
    def virtual_worker(self, num_backwards: int = 0) -> Iterator[None]:
        """The passes of one hosted virtual worker, with buffers (BatchNorm statistics) of its own.

        num_backwards: backward passes of each virtual worker of this step; 0: unknown
        """
        with self.buffers.virtual_worker():
            yield
        if self.is_exact:
            self._end_leaf(next_is_single=num_backwards == 1 and self.may_join)

    def _forget_gradients(self) -> None:
        for param in self.trainable:
            param.grad = None
        self.loss_sum = self.weight_sum = None

    def _end_leaf(self, next_is_single: bool = False) -> None:
        """What stands in `.grad` is a leaf of the tree; the last one's stays there."""
        if self.loss_sum is None:  # without a backward pass, as where forward is only tried
            return
        self._losses.append(LeafLoss(self.loss_sum, self.weight_sum))
        self.loss_sum = self.weight_sum = None
        was_taken = self.gradients is None or self.gradients.leaf_done(next_is_single)
        if was_taken and len(self._losses) < len(self.world.block):
            self._forget_gradients()

    def backward(self, loss: torch.Tensor, share: float | torch.Tensor, is_last: bool = False) -> None:
        """Add `share` of this loss's gradient (and of the loss, for the journal) to the step.

        share:   a number: all shares of a step add up to 1; or a weight, a scalar on the device: what is added up is
                 divided by the sum of all weights in `step`. All micro-batches have the one or all the other
        is_last: no other follows before `step`, so gradients may travel as they arrive
        """
        self.beat("backward")
        if self.is_weighted is not isinstance(share, torch.Tensor):
            refuse_mixture([self.is_weighted, not self.is_weighted])
            self.is_weighted = isinstance(share, torch.Tensor)
        if isinstance(share, torch.Tensor):
            self.weight_sum = share if self.weight_sum is None else self.weight_sum + share
            weighted = torch.where(share > 0, loss * share, 0.0)  # the mean of nothing is NaN, and counts nothing
        else:
            weighted = loss if share == 1.0 else loss * share
        part = weighted.detach()
        self.loss_sum = part if self.loss_sum is None else self.loss_sum + part
        if is_last and self.gradients is not None:
            self.gradients.last_backward_begins()
        scaled: Any = self.precision.scaler.scale(weighted)
        state = torch_random_state(self.world.device) if self.backward_draws is None else None
        scaled.backward()  # with a gradient given, torch imports sympy first: 2 s of every worker's first step
        if state is not None:
            self.backward_draws = torch_random_state(self.world.device) != state

    @torch.no_grad()
    def step(
        self, settings: StepSettings, wishes: Sequence[bool], terms: Sequence[Mapping[Key, Sum]] | None = None
    ) -> Stepped:
        """Collective. Combine, clip and step.

        wishes: this rank's;  terms: what is to be recorded of each virtual worker here, if a record is due
        """
        self._end_leaf()  # if one is open
        assert self._losses, "backward() comes first"
        self.beat("reduce")
        if self.gradients is None:  # one process with one virtual worker, whose gradients stay where they are
            means = None if terms is None else means_of(terms)
            combined = Combined([True] * len(self.params), tuple(wishes), *self._losses[0], terms=means)
        else:
            combined = self.gradients.combine(self._losses, tuple(wishes), terms)
        if not self._weights_agree:  # asked once; after the reduction, since parts of it may be under way before
            refuse_mixture(self.world.all_objects(self.is_weighted))
            self._weights_agree = True
        if self.buffers.looks_left:
            self._agree_on_parameters()
        self._wait_for_readers()
        loss, divisor = combined.loss, None
        if combined.weight is not None:  # where nothing counts the loss is NaN, but no gradient, nor what lies between
            loss, divisor = loss / combined.weight, torch.where(combined.weight > 0, combined.weight, 1.0)
        norm = self.stepper.norm(combined.used, divisor)
        step_if_good = self._step_if_good_late if self.reads_late else self._step_if_good
        bad_step = step_if_good(settings, loss, norm)
        if bad_step is not None and self.guard.actions[bad_step.kind] == "rollback":
            bad_step = dataclasses.replace(bad_step, rolled_back_to=self.roll_back())
        return Stepped(loss, norm, combined.wishes, combined.terms, bad_step)

    @property
    def notes(self) -> list[str]:
        """Lines for the user, to be taken out."""
        return self.gradients.terms.notes if self.gradients else []

    def follow_parameters(self, names: Sequence[str], looks_left: int) -> None:
        """Collective. These parameters, which forward changes by itself, are handled as buffers are."""
        before = self.buffers.parameters
        self.buffers.follow(names, looks_left)
        if self.buffers.parameters != before and self.gradients is not None:
            reduction = self.gradients.reduction
            reduction.stage({**reduction.staging, **self.buffers.parameter_tensors()})

    def _agree_on_parameters(self) -> None:
        """Collective. In the first steps: what forward has changed on any rank, with rank 0's values."""
        found = self.world.all_objects(self.buffers.changed_parameters())
        self.follow_parameters(list(itertools.chain(*found)), self.buffers.looks_left - 1)
        if not self.buffers.looks_left:
            self.newly_followed = self.buffers.parameters
        if self.buffers.parameters and self.world.size > 1:
            values = {key: tensor.cpu() for key, tensor in self.buffers.parameter_tensors().items()}
            self.buffers.take_over(self.world.broadcast_object(values))

    def _step_if_good(self, settings: StepSettings, loss: torch.Tensor, norm: torch.Tensor) -> BadStep | None:
        """Where the verdict can be read at once."""
        verdict = self.guard.read(loss, norm)
        if not verdict:
            self.stepper.step(settings, norm)
            return None
        self.buffers.put_back()
        here = self.gradients.here() if self.gradients else [[p.grad] for p in self.params]
        bad = [p for p, parts in zip(self.params, here, strict=True) if not all(map(is_finite, parts))]
        numbers = int(self.guard.in_a_row), loss.item(), norm.item(), self._loss_here().item()
        return BadStep(KINDS[verdict], 0, *numbers, self._names_of(bad))

    def _step_if_good_late(self, settings: StepSettings, loss: torch.Tensor, norm: torch.Tensor) -> BadStep | None:
        """Where reading would wait for the device: that acts on the verdict, the host hears of it LATE_STEPS later."""
        verdict = self.guard.judge(loss, norm)
        bad = (verdict > 0).float()
        self.stepper.step(settings, norm, bad)
        self.buffers.put_back_if(bad)
        numbers = torch.stack([x.float() for x in (verdict, self.guard.in_a_row, loss, norm, self._loss_here())])
        late = self._late_verdicts.swap(numbers, self.stepper.row_norms)
        if late is None:
            return None
        (kind, in_a_row, loss_then, norm_then, loss_here), row_norms = late
        suspects = [] if row_norms is None else self.stepper.in_bad_rows(row_norms)
        return BadStep(
            KINDS[int(kind)], LATE_STEPS, int(in_a_row), loss_then, norm_then, loss_here, self._names_of(suspects)
        )

    def _loss_here(self) -> torch.Tensor:
        """This process's part of the loss."""
        return sum((each.loss for each in self._losses[1:]), self._losses[0].loss)

    def _names_of(self, params: Sequence[torch.nn.Parameter]) -> list[str]:
        """In the order of the model."""
        wanted = set(params)
        return [name for p, name in self._names.items() if p in wanted]

    @property
    def arithmetic(self) -> dict[str, str | bool]:
        """What decides the rounding of a step besides config and hardware, for the checkpoint's fingerprint.

        reduction counts only where the step is not exact.
        """
        reduction = self.gradients.reduction.kind if self.gradients else Reduction.kind
        return {"engine": self.stepper.kind, "exact": self.is_exact, "reduction": reduction}

    def optimizer_state(self, live: bool = False) -> dict[str, Any]:
        """In torch's form, parameter by parameter, whatever steps them; order and structure do not depend on `live`.

        live: the tensors are (views of) the memory that steps change, nothing is copied
        """
        return self.stepper.state_dict(live)

    def live_tensors(self) -> dict[str, torch.Tensor]:
        """All that a step changes, where it lies: weights, moments, step counts and buffers, by name."""
        tensors = {f"params.{i}": p.detach() for i, p in enumerate(self.params)}
        for i, entry in self.optimizer_state(live=True)["state"].items():
            tensors |= {f"moments.{i}.{name}": value for name, value in entry.items() if torch.is_tensor(value)}
        return tensors | {f"buffers.{i}.{name}": buffer for (i, name), buffer in self.buffers.tensors().items()}

    def drop_anchor(self, step: int) -> None:
        """The state as it is after `step` steps is what a rollback goes back to."""
        self._wait_for_readers()
        self.guard.drop_anchor(step, self.live_tensors())

    @torch.no_grad()
    def roll_back(self) -> int:
        """Return to the guard's anchor; the steps that had been taken there."""
        self.guard.roll_back(self.live_tensors())
        self.stepper.state_changed()
        return int(self.guard.anchor_step)

    def load_guard(self, state: dict[str, Any]) -> None:
        """What a checkpoint holds of the guard; an older one holds nothing."""
        self.guard.load(state, self.live_tensors())
        self._late_verdicts = LateVerdicts(self.guard)

    def newly_untrained(self) -> list[str]:
        """Names of trainable parameters that no step changes: they came, or were unfrozen, since it was last asked."""
        new = {p: name for name, p in self.model.named_parameters() if p.requires_grad and p not in self._known}
        self._known |= new.keys()
        return list(new.values())

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Takes the moments over; CheckpointError, and nothing changes, if they are not of this model and optimizer."""
        self.stepper.load_state_dict(state)
