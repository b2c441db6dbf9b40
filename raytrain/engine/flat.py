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

from raytrain.engine.layout import ROW, Layout
from raytrain.engine.optim import EPS, OptimizerOptions, checked_moments, torch_groups
from raytrain.engine.schedule import StepSettings
from raytrain.errors import TrainingError


@dataclasses.dataclass
class Span:
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
    """A Stepper of flat buffers, with torch's fused kernels; the clip coefficient rides in as gradient scale."""

    kind = "flat"

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        options: OptimizerOptions,
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
        self._has_moments = [False] * len(self.params)  # whether it has moments: from its first step on
        self._last = StepSettings(options.lr, None if options.is_adam else options.momentum, None, options.weight_decay)
        self._spans: list[Span] = []
        self._used: Sequence[bool] | None = None
        self.row_norms: list[torch.Tensor] = []  # by dtype: (rows,), of the newest step
        self._used_changed = False  # so that parameters take their first step perhaps

    def norm(self, used: Sequence[bool], divisor: torch.Tensor | None = None) -> torch.Tensor:
        if [p.data_ptr() for p in self.params] != self._addresses:
            self._put_views_back()
        if used != self._used:
            self._cut_spans(used)
        if divisor is not None:
            torch._foreach_div_(list(self._gradients.values()), divisor)
        self.row_norms = [torch.linalg.vector_norm(rows, dim=1) for rows in self._rows]
        norms = [torch.linalg.vector_norm(of_rows) for of_rows in self.row_norms]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([n.double() for n in norms]))

    def step(self, settings: StepSettings, norm: torch.Tensor, bad: torch.Tensor | None = None) -> None:
        if self._used_changed and self._used is not None:
            self._has_moments = [had or uses for had, uses in zip(self._has_moments, self._used, strict=True)]
            self._used_changed = False
        if settings.momentum is None:
            settings = dataclasses.replace(settings, momentum=self._last.momentum)
        self._last = settings
        divisor = None if settings.clip is None else ((norm + 1e-6) / settings.clip).clamp(min=1.0)
        taken = 1.0 if bad is None else 1 - bad
        for span in self._spans:
            self._step_span(span, divisor, taken, bad)

    def are_finite(self) -> torch.Tensor:
        extremes = [each.double() for flat in self._values.values() for each in torch.aminmax(flat)]  # NaN is both
        return torch.stack(extremes).isfinite().all()

    def in_bad_rows(self, row_norms: Sequence[torch.Tensor]) -> list[nn.Parameter]:
        bad = dict(zip(self._gradients, ((~norms.isfinite()).tolist() for norms in row_norms), strict=True))
        places = zip(self.params, self.layout.places, strict=True)
        return [p for p, place in places if any(bad[place.dtype][place.start // ROW : -(-place.stop // ROW)])]

    def state_dict(self, live: bool = False) -> dict[str, Any]:
        moments = {n: self.layout.views(flat) for n, flat in zip(self._moment_names(), self._moments, strict=True)}
        counts = self._counts if live else self._counts.cpu()
        state: dict[int, dict[str, torch.Tensor]] = {}
        for position, has_moments in enumerate(self._has_moments):
            if has_moments and (self.options.is_adam or self._last.momentum):
                state[position] = {"step": counts[position]} if self.options.is_adam else {}
                state[position] |= {name: views[position] for name, views in moments.items()}
                if not live:
                    state[position] = {name: tensor.clone() for name, tensor in state[position].items()}
        return {"state": state, "param_groups": torch_groups(self._group_sizes, self.options, self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own = torch_groups(self._group_sizes, self.options, self._last)
        moments = checked_moments(state, own, self.params)
        for flat in self._moments:
            for buffer in flat.values():
                buffer.zero_()
        self._has_moments = [False] * len(self.params)
        counts = torch.zeros(len(self.params))
        for flat, name in zip(self._moments, self._moment_names(), strict=True):
            views = self.layout.views(flat)
            for position, entry in moments.items():
                if entry.get(name) is not None:
                    views[position].copy_(entry[name])
                    self._has_moments[position] = True
                    counts[position] = float(entry.get("step", 1))
        self._counts.copy_(counts)
        self.state_changed()

    def state_changed(self) -> None:
        self._spans, self._used = [], None  # they were cut by the counts

    def _moment_names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq") if self.options.is_adam else ("momentum_buffer",)

    def _step_span(
        self, span: Span, divisor: torch.Tensor | None, taken: torch.Tensor | float, bad: torch.Tensor | None
    ) -> None:
        if divisor is not None and span.dtype is torch.float64:  # the kernels take f32 scales only
            span.gradients.div_(divisor)
            divisor = None
        scale = None if divisor is None else divisor.float()
        options, last = self.options, self._last
        span.counts.add_(taken)
        if options.is_adam:
            kernel = torch._fused_adamw_ if options.kind == "adamw" else torch._fused_adam_
            beta1 = options.betas[0] if last.momentum is None else last.momentum
            kernel(
                [span.values], [span.gradients], [span.moments[0]], [span.moments[1]], [], [span.step],
                amsgrad=False, lr=last.lr, beta1=beta1, beta2=options.betas[1], weight_decay=last.weight_decay,
                eps=EPS, maximize=False, grad_scale=scale, found_inf=bad,
            )  # fmt: skip
        else:  # the first step needs no telling: momentum times the zeros that are there adds nothing
            torch._fused_sgd_(
                [span.values], [span.gradients], span.moments if last.momentum else [],
                weight_decay=last.weight_decay, momentum=last.momentum or 0.0, lr=last.lr, dampening=0.0,
                nesterov=False, maximize=False, is_first_step=False, grad_scale=scale, found_inf=bad,
            )  # fmt: skip

    def _cut_spans(self, used: Sequence[bool]) -> None:
        """Cut the buffers into spans of neighbours that take this step and have taken as many before."""
        self._used, self._used_changed = list(used), True
        taken = self._counts.tolist()
        neighbours: list[list[int]] = []
        for position, place in enumerate(self.layout.places):
            if not used[position]:
                continue
            last = neighbours[-1] if neighbours else None
            joins = (
                last is not None
                and last[-1] == position - 1
                and self.layout.places[last[-1]].dtype is place.dtype
                and taken[last[-1]] == taken[position]
            )
            if joins and last is not None:
                last.append(position)
            else:
                neighbours.append([position])
        self._spans = [self._span_of(positions) for positions in neighbours]

    def _span_of(self, positions: list[int]) -> Span:
        first, last = self.layout.places[positions[0]], self.layout.places[positions[-1]]

        def part(flat: Mapping[torch.dtype, torch.Tensor]) -> torch.Tensor:
            return flat[first.dtype][first.start : last.stop]

        moments = [part(flat) for flat in self._moments]
        counts = self._counts[positions[0] : positions[-1] + 1]
        return Span(first.dtype, part(self._values), part(self._gradients), moments, counts, counts[0])

    def _put_views_back(self) -> None:
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
