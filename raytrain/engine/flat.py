"""Parameters, gradients and moments in flat buffers: one norm and one fused step for the whole model.

A step over 300 small tensors is 300 times the overhead of a step over one large one. Modules see
views and notice nothing; the state that is saved is torch's, parameter by parameter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from raytrain.engine.optim import EPS, Options, checked_moments, torch_groups
from raytrain.engine.schedule import StepSettings
from raytrain.errors import TrainingError

ALIGN = 16  # elements: vector loads of a view begin on a cache line
ROW = 4096  # a norm is of the norms of rows this long; one f32 sum over 50 million squares is 0.4 % wrong
DTYPES = (torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a parameter lies in the flat buffer of its dtype."""

    dtype: torch.dtype
    start: int
    stop: int
    shape: torch.Size
    stride: tuple[int, ...]


class Layout:
    """Where each of `params` lies in one flat buffer per dtype.

    sizes: elements of each buffer, a whole number of ROWs; what lies between parameters stays zero
    """

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        self.places: list[Place] = []
        ends: dict[torch.dtype, int] = {}
        for p in params:
            start = ends.get(p.dtype, 0)
            stop = start + p.numel()
            # The strides of a dense tensor are kept (channels_last); any other becomes contiguous.
            self.places.append(Place(p.dtype, start, stop, p.shape, torch.empty_like(p).stride()))
            ends[p.dtype] = -(-stop // ALIGN) * ALIGN
        self.sizes = {dtype: -(-end // ROW) * ROW for dtype, end in ends.items()}

    def views(self, buffers: Mapping[torch.dtype, torch.Tensor]) -> list[torch.Tensor]:
        """Each parameter's part of `buffers`, in its own shape and strides."""
        return [
            torch.as_strided(buffers[p.dtype], p.shape, p.stride, p.start + buffers[p.dtype].storage_offset())
            for p in self.places
        ]


@dataclasses.dataclass
class Run:
    """Neighbours in one buffer that have taken the same number of steps, and step together.

    counts: (parameters,), the steps that each has taken;  step: the first of them, which all are equal to
    """

    dtype: torch.dtype
    values: torch.Tensor
    gradients: torch.Tensor
    moments: list[torch.Tensor]
    counts: torch.Tensor
    step: torch.Tensor


class FlatStepper:
    """Clips and steps flat buffers with torch's fused kernels; the clip coefficient rides in as gradient scale."""

    kind = "flat"

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        options: Options,
        layout: Layout,
        gradients: Mapping[torch.dtype, torch.Tensor],
        names: Mapping[nn.Parameter, str],
    ) -> None:
        self.options, self.layout = options, layout
        self.params = [p for group in groups for p in group]
        self._names = names
        self._group_sizes = [len(group) for group in groups]
        self._gradients = {dtype: gradients[dtype][:size] for dtype, size in layout.sizes.items()}
        self._rows = [flat.view(-1, ROW) for flat in self._gradients.values()]
        device = self.params[0].device
        self._values = {d: torch.zeros(size, dtype=d, device=device) for d, size in layout.sizes.items()}
        self._moments = [{d: torch.zeros_like(flat) for d, flat in self._values.items()} for _ in self._moment_names()]
        self._views = layout.views(self._values)
        for param, view in zip(self.params, self._views, strict=True):
            view.copy_(param.detach())
            param.data = view
        self._addresses = [p.data_ptr() for p in self.params]
        self._counts = torch.zeros(len(self.params), device=device)  # steps that each parameter has taken
        self._held = [False] * len(self.params)  # whether it has moments: from its first step on
        self._last = StepSettings(options.lr, None if options.is_adam else options.momentum, None, options.weight_decay)
        self._runs: list[Run] = []
        self._used: Sequence[bool] | None = None
        self.row_norms: list[torch.Tensor] = []  # by dtype: (rows,), of the newest step
        self._joins = False  # whether parameters take their first step perhaps

    def norm(self, used: Sequence[bool]) -> torch.Tensor:
        """The L2 norm of the gradients that `step` will take: a scalar on the device, without a host sync.

        used: for each parameter, whether it has a gradient; one that has none stays as it is
        """
        if [p.data_ptr() for p in self.params] != self._addresses:
            self._take_back()
        if used != self._used:
            self._regroup(used)
        self.row_norms = [torch.linalg.vector_norm(rows, dim=1) for rows in self._rows]
        norms = [torch.linalg.vector_norm(of_rows) for of_rows in self.row_norms]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([n.double() for n in norms]))

    def step(self, settings: StepSettings, norm: torch.Tensor, bad: torch.Tensor | None = None) -> None:
        """Clips by `norm` and steps. bad: a f32 scalar on the device; if it is 1, nothing changes, to the bit."""
        if self._joins and self._used is not None:
            self._held = [held or now for held, now in zip(self._held, self._used, strict=True)]
            self._joins = False
        if settings.momentum is None:
            settings = dataclasses.replace(settings, momentum=self._last.momentum)
        self._last = settings
        divisor = None if settings.clip is None else ((norm + 1e-6) / settings.clip).clamp(min=1.0)
        taken = 1.0 if bad is None else 1 - bad
        for run in self._runs:
            self._step_run(run, divisor, taken, bad)

    def are_finite(self) -> torch.Tensor:
        """Whether all values that are stepped are finite: a scalar on the device."""
        extremes = [each.double() for flat in self._values.values() for each in torch.aminmax(flat)]  # NaN is both
        return torch.stack(extremes).isfinite().all()

    def in_bad_rows(self, row_norms: Sequence[torch.Tensor]) -> list[nn.Parameter]:
        """Those of which a part lies in a row of the gradient whose norm is not finite. Waits for the device."""
        bad = dict(zip(self._gradients, ((~norms.isfinite()).tolist() for norms in row_norms), strict=True))
        places = zip(self.params, self.layout.places, strict=True)
        return [p for p, place in places if any(bad[place.dtype][place.start // ROW : -(-place.stop // ROW)])]

    def gradients_here(self) -> list[torch.Tensor | None]:
        """Of each parameter, what this process computed, before it was summed and clipped."""
        return [p.grad for p in self.params]

    def state_dict(self, live: bool = False) -> dict[str, Any]:
        """As torch's optimizer over the same groups would give it.

        live: the tensors are views of the memory that steps change, instead of copies
        """
        moments = {n: self.layout.views(flat) for n, flat in zip(self._moment_names(), self._moments, strict=True)}
        counts = self._counts if live else self._counts.cpu()
        state: dict[int, dict[str, torch.Tensor]] = {}
        for position, held in enumerate(self._held):
            if held and (self.options.is_adam or self._last.momentum):
                state[position] = {"step": counts[position]} if self.options.is_adam else {}
                state[position] |= {name: views[position] for name, views in moments.items()}
                if not live:
                    state[position] = {name: tensor.clone() for name, tensor in state[position].items()}
        return {"state": state, "param_groups": torch_groups(self._group_sizes, self.options, self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the moments of a state_dict of torch's form, ours or OpenPCDet's; all settings stay this run's.

        CheckpointError if it is of another kind of optimizer or of another model; then nothing changes.
        """
        own = torch_groups(self._group_sizes, self.options, self._last)
        found = checked_moments(state, own, self.params)
        for flat in self._moments:
            for buffer in flat.values():
                buffer.zero_()
        self._held = [False] * len(self.params)
        counts = torch.zeros(len(self.params))
        for flat, name in zip(self._moments, self._moment_names(), strict=True):
            views = self.layout.views(flat)
            for position, entry in found.items():
                if entry.get(name) is not None:
                    views[position].copy_(entry[name])
                    self._held[position] = True
                    counts[position] = float(entry.get("step", 1))
        self._counts.copy_(counts)
        self.regroup()

    def regroup(self) -> None:
        """Call it when the counts have been changed from outside (`state_dict(live=True)`)."""
        self._runs, self._used = [], None

    def _moment_names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq") if self.options.is_adam else ("momentum_buffer",)

    def _step_run(
        self, run: Run, divisor: torch.Tensor | None, taken: torch.Tensor | float, bad: torch.Tensor | None
    ) -> None:
        if divisor is not None and run.dtype is torch.float64:  # the kernels take f32 scales only
            run.gradients.div_(divisor)
            divisor = None
        scale = None if divisor is None else divisor.float()
        options, last = self.options, self._last
        run.counts.add_(taken)
        if options.is_adam:
            kernel = torch._fused_adamw_ if options.kind == "adamw" else torch._fused_adam_
            beta1 = options.betas[0] if last.momentum is None else last.momentum
            kernel(
                [run.values], [run.gradients], [run.moments[0]], [run.moments[1]], [], [run.step],
                amsgrad=False, lr=last.lr, beta1=beta1, beta2=options.betas[1], weight_decay=last.weight_decay,
                eps=EPS, maximize=False, grad_scale=scale, found_inf=bad,
            )  # fmt: skip
        else:  # the first step needs no telling: momentum times the zeros that are there adds nothing
            torch._fused_sgd_(
                [run.values], [run.gradients], run.moments if last.momentum else [],
                weight_decay=last.weight_decay, momentum=last.momentum or 0.0, lr=last.lr, dampening=0.0,
                nesterov=False, maximize=False, is_first_step=False, grad_scale=scale, found_inf=bad,
            )  # fmt: skip

    def _regroup(self, used: Sequence[bool]) -> None:
        """Cut the buffers into runs of neighbours that take this step and have taken as many before."""
        self._used, self._joins = list(used), True
        taken = self._counts.tolist()
        spans: list[list[int]] = []
        for position, place in enumerate(self.layout.places):
            if not used[position]:
                continue
            last = spans[-1] if spans else None
            joins = (
                last is not None
                and last[-1] == position - 1
                and self.layout.places[last[-1]].dtype is place.dtype
                and taken[last[-1]] == taken[position]
            )
            if joins and last is not None:
                last.append(position)
            else:
                spans.append([position])
        self._runs = [self._run_of(span) for span in spans]

    def _run_of(self, span: list[int]) -> Run:
        first, last = self.layout.places[span[0]], self.layout.places[span[-1]]

        def part(flat: Mapping[torch.dtype, torch.Tensor]) -> torch.Tensor:
            return flat[first.dtype][first.start : last.stop]

        moments = [part(flat) for flat in self._moments]
        counts = self._counts[span[0] : span[-1] + 1]
        return Run(first.dtype, part(self._values), part(self._gradients), moments, counts, counts[0])

    def _take_back(self) -> None:
        """A module has put another tensor behind a parameter (`.data =`): take its values, and put the view back."""
        for position, (param, view) in enumerate(zip(self.params, self._views, strict=True)):
            if param.data_ptr() == self._addresses[position]:
                continue
            if (param.shape, param.dtype, param.device) != (view.shape, view.dtype, view.device):
                raise TrainingError(
                    f"{self._names[param]} was {tuple(view.shape)} {view.dtype} on {view.device} when training began "
                    f"and is now {tuple(param.shape)} {param.dtype} on {param.device}: a module re-assigned its "
                    ".data. Convert the model in build_model, or set OPTIMIZATION.ENGINE: ddp"
                )
            view.copy_(param.detach())
            param.data = view


def copy_all(views: Sequence[torch.Tensor], grads: Sequence[Any]) -> None:
    """Each of `grads` into its view; a sparse one becomes dense there."""
    if any(grad.layout is not torch.strided for grad in grads):
        grads = [grad.to_dense() for grad in grads]
    if views:
        torch._foreach_copy_(list(views), list(grads))


def collect(views: Sequence[torch.Tensor], params: Sequence[nn.Parameter]) -> list[bool]:
    """Copies each parameter's gradient into its view, zeros where there is none; which parameters have one."""
    grads = [p.grad for p in params]
    used = [grad is not None for grad in grads]
    if all(used):
        copy_all(views, grads)
        return used
    copy_all([v for v, u in zip(views, used, strict=True) if u], [g for g in grads if g is not None])
    for view in (v for v, u in zip(views, used, strict=True) if not u):
        view.zero_()
    return used


def why_not_flat(model: nn.Module, params: Sequence[nn.Parameter], scaled: bool) -> str | None:
    """What keeps `params` out of flat buffers; None if nothing does.

    scaled: whether the loss is scaled (fp16), for which torch's GradScaler needs torch's optimizer
    """
    if scaled:
        return "fp16's loss scaler works on torch's own optimizer"
    names = {p: name for name, p in model.named_parameters()}
    for p in params:
        if p.dtype not in DTYPES:
            return f"{names[p]} is {p.dtype}"
    if len({p.device for p in params}) > 1:
        return "the parameters lie on several devices"
    if any(type(p) is not nn.Parameter for p in params):
        odd = next(p for p in params if type(p) is not nn.Parameter)
        return f"{names[odd]} is a {type(odd).__name__}"
    return _memory_shared(model, params)


def _memory_shared(model: nn.Module, params: Sequence[nn.Parameter]) -> str | None:
    """Two tensors in one memory stay so only where they are."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    moved = {id(p) for p in params}
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + _extent_bytes(t), name, id(t) in moved)
        for name, t in tensors.items()
        if t.numel() and t.layout is torch.strided
    )
    end, owner, owner_moves = 0, "", False
    for begin, stop, name, moves in spans:
        if begin < end and (moves or owner_moves):
            return f"{owner} and {name} share memory"
        if stop > end:
            end, owner, owner_moves = stop, name, moves
    return None


def _extent_bytes(tensor: torch.Tensor) -> int:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()
