"""What happens to gradients: combined over the virtual workers, clipped, stepped.

The loop hands losses in and gets a step out; how gradients travel is this module's alone.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from raytrain.engine.buffers import Snapshot, copy_fitting, is_writable, put_back
from raytrain.engine.flat import FlatStepper
from raytrain.engine.guard import KINDS, BadStep, Guard, is_finite
from raytrain.engine.late import LATE_STEPS, LateReader
from raytrain.engine.layout import Layout, collect, why_not_flat
from raytrain.engine.optim import optimizer_options, stepped_groups
from raytrain.engine.overlap import SEGMENT_BYTES, Overlap
from raytrain.engine.per_parameter import TorchStepper
from raytrain.engine.precision import Precision
from raytrain.engine.reduction import CollectiveReduction, Reduction, open_reduction
from raytrain.engine.schedule import StepSettings
from raytrain.engine.stepper import Stepper
from raytrain.engine.world import World
from raytrain.errors import TaskError

MAX_WISHES = 3  # of the loop two; one is the engine's own


@dataclasses.dataclass(frozen=True)
class Stepped:
    """What one step leaves behind: device scalars, not yet read, and what the ranks agreed on.

    loss:      mean over all micro-batches of all virtual workers
    grad_norm: L2 over the stepped parameters, before clipping
    wishes:    for each wish of `Engine.step`, whether some rank had it
    bad_step:   the step that changed nothing since its numbers were bad, if one is known now: this one, on a GPU
               the one of two steps ago
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    wishes: tuple[bool, ...]
    bad_step: BadStep | None


class Engine:
    """Gradients of all virtual workers -> one optimizer step, the same on every process.

    Each step the gradients are copied into one flat buffer per dtype and summed over the processes.
    The loss, the ranks' wishes (stop, save) and which parameters were used ride in its tail, so
    agreeing on them costs no collective of its own. A step whose loss or gradient is not finite, or a
    spike, changes nothing: no weight, moment, step count or buffer (engine/guard.py).

    why_ddp: if OPTIMIZATION.ENGINE is auto and flat buffers cannot hold the model, what keeps it out
    beat:    told what this rank is at, by the names of keeper.heartbeat.PHASES
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optim_cfg: Any,
        world: World,
        reduction: str = "auto",
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """Collective. `reduction` is SCALE.REDUCTION; larger gradients than segment_bytes are summed in parts."""
        self.model, self.world = model, world
        self.beat: Callable[[str], None] = lambda phase: None
        self.precision = Precision(optim_cfg, world.device)
        groups, options = stepped_groups(model, optim_cfg), optimizer_options(optim_cfg)
        self.params = [p for group in groups for p in group]
        self.num_moments = options.num_moments
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self._met = set(self.trainable)
        self._names = {p: name for name, p in model.named_parameters()}
        self.why_ddp = None
        if optim_cfg.ENGINE != "ddp":
            self.why_ddp = why_not_flat(model, self.params, scaled=self.precision.scaler.is_enabled())
            if self.why_ddp and optim_cfg.ENGINE == "flat":
                raise TaskError(f"OPTIMIZATION.ENGINE is flat, but {self.why_ddp}; set it to auto or ddp")
        flat = optim_cfg.ENGINE != "ddp" and self.why_ddp is None
        self._buffer_dicts = [module._buffers for module in model.modules()]
        self._found: tuple[list[Any], list[Any], dict[tuple[int, str], torch.Tensor]] = ([], [], {})
        layout = Layout(self.params)
        self._tail_dtype = torch.float64 if torch.float64 in layout.sizes else torch.float32
        self._tail_start = layout.sizes.get(self._tail_dtype, 0)
        tail_stop = self._tail_start + len(self.params) + MAX_WISHES + 1
        self.reduction: Reduction | None = None
        gradients = None
        if flat or world.size > 1:
            sizes = {**layout.sizes, self._tail_dtype: tail_stop}
            self.reduction = open_reduction(sizes, self._buffers(), world, reduction)
            self._views = layout.views(self.reduction.addends)
            addends, sums = self.reduction.addends[self._tail_dtype], self.reduction.sums[self._tail_dtype]
            self._flags_there, self._loss_there = addends[self._tail_start : -1], addends[-1]
            self._tail, self._loss = sums[self._tail_start :], sums[-1]
            gradients = layout.views(self.reduction.sums)
        self.overlap: Overlap | None = None
        gradient_bytes = sum(size * dtype.itemsize for dtype, size in layout.sizes.items())
        if isinstance(self.reduction, CollectiveReduction) and gradient_bytes > segment_bytes:
            self.overlap = Overlap(model, self.params, layout, self._views, self.reduction, segment_bytes)
        self.stepper: Stepper
        if flat and self.reduction is not None:
            self.stepper = FlatStepper(groups, options, layout, self.reduction.sums, self._names)
        else:
            fused = world.device.type == "cuda" and all(p.is_floating_point() for p in self.params)
            self.stepper = TorchStepper(groups, options, self.precision.scaler, gradients, fused)
        self.guard = Guard(optim_cfg, world.device, scaled=self.precision.scaler.is_enabled())
        self.readers_done: torch.cuda.Event | None = None  # what reads the parameters beside the computation
        self.loss_sum: torch.Tensor | None = None
        self._flags: tuple[list[bool], tuple[bool, ...]] | None = None
        self._flags_here = torch.empty(0)
        self._kept = Snapshot({})
        self._first_done = False
        self._late_rows: deque[list[torch.Tensor]] = deque(maxlen=LATE_STEPS + 1)
        self._late_wishes = LateReader()
        self.reads_late = world.device.type != "cpu"  # whether reading a verdict at once would wait for the device
        self._late_verdicts = LateReader(self.guard.unread.tolist())

    def wait_for_readers(self) -> None:
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
        """Forget the gradients of every parameter, stepped or not (the heritage forgets some not, D6)."""
        for param in self.trainable:
            param.grad = None
        self.loss_sum = None
        self._first_done = False
        buffers = self._buffers()
        if self._kept.of is not buffers:
            self._kept = Snapshot(buffers)
        self._kept.take()

    @contextmanager
    def virtual_worker(self) -> Iterator[None]:
        """The forward passes of one hosted virtual worker, with buffers (BatchNorm statistics) of its own.

        Each starts from the buffers the step began with; the first one's remain. Over all
        processes those are virtual worker 0's, as DistributedDataParallel broadcasts rank 0's.
        One that a module makes anew in another shape (a cache that grows) stays what it made.
        """
        if not self._first_done:
            self._first_done = True
            yield
            return
        firsts = self._copied_buffers()
        copy_fitting(self._buffers(), self._kept.values)
        try:
            yield
        finally:
            copy_fitting(self._buffers(), firsts)

    def backward(self, loss: torch.Tensor, share: float, is_last: bool = False) -> None:
        """Add `share` of this loss's gradient (and of the loss, for the journal) to the step.

        is_last: no other follows before `step`, so gradients may travel as they arrive
        """
        self.beat("backward")
        weighted = loss if share == 1.0 else loss * share
        part = weighted.detach()
        self.loss_sum = part if self.loss_sum is None else self.loss_sum + part
        if is_last and self.overlap is not None:
            self.overlap.arm()
        scaled: Any = self.precision.scaler.scale(weighted)
        scaled.backward()  # with a gradient given, torch imports sympy first: 2 s of every worker's first step

    @torch.no_grad()
    def step(self, settings: StepSettings, wishes: Sequence[bool]) -> Stepped:
        """Collective. Combine, clip and step; `wishes` are this rank's."""
        assert self.loss_sum is not None, "backward() comes first"
        self.beat("reduce")
        granted, used, loss = tuple(wishes), [True], self.loss_sum
        if self.reduction is not None:
            if self.overlap is not None and self.overlap.armed:
                used = self.overlap.finish()
            else:
                self.reduction.open()
                used = collect(self._views, self.params)
            if self.world.size == 1:
                self.reduction.reduce({})
            else:
                firsts = self._buffers()
                moved = self.reduction.unstaged(firsts) if self.world.is_first else {}
                self._write_tail(used, (*granted, bool(moved)))
                self.reduction.reduce(firsts)
                used, (*others, some_moved), loss = self._read_tail(len(granted) + 1)
                granted = tuple(others)
                if some_moved and self.world.device.type == "cpu":  # a GPU would learn of it too late
                    copy_fitting(firsts, self.world.broadcast_object(moved))
        self.wait_for_readers()
        norm = self.stepper.norm(used)
        step = partial(self.stepper.step, settings, norm)
        bad_step = (self._step_if_good_late if self.reads_late else self._step_if_good)(step, loss, norm)
        return Stepped(loss, norm, granted, bad_step)

    def _step_if_good(self, step: partial[None], loss: torch.Tensor, norm: torch.Tensor) -> BadStep | None:
        """Where the verdict can be read at once."""
        assert self.loss_sum is not None
        verdict = self.guard.read(loss, norm)
        if not verdict:
            step()
            return None
        copy_fitting(self._buffers(), self._kept.values)
        bad = [p for p, g in zip(self.params, self.stepper.gradients_here(), strict=True) if not is_finite(g)]
        numbers = int(self.guard.in_a_row), loss.item(), norm.item(), self.loss_sum.item()
        return BadStep(KINDS[verdict], 0, *numbers, self._names_of(bad))

    def _step_if_good_late(self, step: partial[None], loss: torch.Tensor, norm: torch.Tensor) -> BadStep | None:
        """Where reading would wait for the device: that acts on the verdict, the host hears of it two steps later."""
        assert self.loss_sum is not None
        verdict = self.guard.judge(loss, norm)
        bad = (verdict > 0).float()
        step(bad)
        put_back(self._buffers(), self._kept.values, bad)
        told = torch.stack([x.float() for x in (verdict, self.guard.in_a_row, loss, norm, self.loss_sum)])
        if self.guard.rollback_every is not None:  # a run that is resumed in between must hear of it too
            self.guard.unread.copy_(torch.cat([self.guard.unread[1:], told[None]]))
        heard = self._late_verdicts.swap(told)
        self._late_rows.append(self.stepper.row_norms)
        if heard is None or not heard[0]:
            return None
        kind, in_a_row, summed, of_norm, here = heard
        near = self.stepper.in_bad_rows(self._late_rows[0]) if len(self._late_rows) > LATE_STEPS else []
        return BadStep(KINDS[int(kind)], LATE_STEPS, int(in_a_row), summed, of_norm, here, self._names_of(near))

    def _names_of(self, params: Sequence[torch.nn.Parameter]) -> list[str]:
        """In the order of the model."""
        wanted = set(params)
        return [name for p, name in self._names.items() if p in wanted]

    @property
    def arithmetic(self) -> dict[str, str]:
        """What decides the rounding of a step besides config and hardware, for the checkpoint's fingerprint."""
        return {"engine": self.stepper.kind, "reduction": self.reduction.kind if self.reduction else Reduction.kind}

    def optimizer_state(self, live: bool = False) -> dict[str, Any]:
        """In torch's form, parameter by parameter, whatever steps them; order and structure do not depend on `live`.

        live: the tensors are (views of) the memory that steps change, nothing is copied
        """
        return self.stepper.state_dict(live)

    def live_tensors(self) -> dict[str, torch.Tensor]:
        """All that a step changes, where it lies: weights, moments, step counts and buffers, by name."""
        found = {f"params.{i}": p.detach() for i, p in enumerate(self.params)}
        for i, entry in self.optimizer_state(live=True)["state"].items():
            found |= {f"moments.{i}.{name}": value for name, value in entry.items() if torch.is_tensor(value)}
        return found | {f"buffers.{i}.{name}": buffer for (i, name), buffer in self._buffers().items()}

    def drop_anchor(self, step: int) -> None:
        """The state as it is after `step` steps is what a rollback goes back to."""
        self.wait_for_readers()
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
        self._late_verdicts = LateReader(self.guard.unread.tolist())
        self._late_rows.clear()

    def newly_untrained(self) -> list[str]:
        """Names of trainable parameters that no step changes: they came, or were unfrozen, since it was last asked."""
        found = {p: name for name, p in self.model.named_parameters() if p.requires_grad and p not in self._met}
        self._met |= found.keys()
        return list(found.values())

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Takes the moments over; CheckpointError, and nothing changes, if they are not of this model and optimizer."""
        self.stepper.load_state_dict(state)

    def _write_tail(self, used: list[bool], wishes: tuple[bool, ...]) -> None:
        """What this process used, wished and lost, behind its gradients."""
        assert self.loss_sum is not None
        if self._flags != (used, wishes):  # seldom; else what stands on the device is copied, without the host
            self._flags = (used, wishes)
            flags = [*used, *wishes, *[False] * (MAX_WISHES - len(wishes))]
            self._flags_here = torch.tensor(flags, dtype=self._tail_dtype).to(self._tail.device)
        self._flags_there.copy_(self._flags_here)
        self._loss_there.copy_(self.loss_sum)

    def _read_tail(self, num_wishes: int) -> tuple[list[bool], tuple[bool, ...], torch.Tensor]:
        """What all processes together used, wished and lost."""
        loss, count = self._loss.clone(), len(self.params)
        if self._tail.device.type == "cpu":
            flags = [value > 0 for value in self._tail.tolist()]
            return flags[:count], tuple(flags[count : count + num_wishes]), loss
        # On a GPU asking would wait for it; there parameters that no process uses get zero gradients.
        return (
            [p.requires_grad for p in self.params],
            self._wishes_of_late(self._tail[count : count + num_wishes]),
            loss,
        )

    def _wishes_of_late(self, summed: torch.Tensor) -> tuple[bool, ...]:
        """The wishes of all ranks two steps ago: those have arrived without waiting."""
        counts = self._late_wishes.swap(summed) or [0.0] * len(summed)
        return tuple(count > 0 for count in counts)

    def _buffers(self) -> dict[tuple[int, str], torch.Tensor]:
        """By module and name; looked up each time, as a module may put another tensor, or memory, in a buffer's place.

        While none does, the same dict.
        """
        if not (self._found[2] or any(self._buffer_dicts)):
            return self._found[2]
        buffers = [buffer for buffers in self._buffer_dicts for buffer in buffers.values() if buffer is not None]
        places = [(b.data_ptr() if b.layout is torch.strided else 0, b.shape) for b in buffers]
        before, places_before, found = self._found
        if places == places_before and all(map(operator.is_, buffers, before)):
            return found
        found = {}
        seen: set[int] = set()
        for index, named in enumerate(self._buffer_dicts):
            for name, buffer in named.items():
                if buffer is not None and id(buffer) not in seen and buffer.numel() and is_writable(buffer):
                    seen.add(id(buffer))
                    found[index, name] = buffer.detach()
        self._found = buffers, places, found
        return found

    def _copied_buffers(self) -> dict[tuple[int, str], torch.Tensor]:
        return {key: buffer.clone() for key, buffer in self._buffers().items()}
