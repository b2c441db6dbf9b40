"""What OPTIMIZATION asks to be stepped and how: parameter groups, options, torch's optimizers, their state.

Mathematics and group order are OpenPCDet's (tests/golden/toy holds runs of its own code).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # 1d, 2d, 3d and both synchronised ones
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from raytrain.engine.schedule import CYCLING, StepSettings, schedule_name
from raytrain.errors import CheckpointError, ConfigError, TaskError

TWO_GROUP_OPTIMIZERS = ("adam_onecycle", "adam_cosineanneal")
EPS = 1e-8  # torch's default, and OpenPCDet's


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer in torch's terms: `kind` is adam (decay in the gradient), adamw (beside it) or sgd."""

    kind: str
    lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.0

    @property
    def is_adam(self) -> bool:
        return self.kind != "sgd"

    @property
    def num_moments(self) -> int:
        """Tensors like itself that the optimizer keeps of each parameter."""
        return 2 if self.is_adam else int(self.momentum > 0)


def optimizer_options(optim_cfg: Any) -> OptimizerOptions:
    """What the OPTIMIZATION section says; lr, beta1 and weight_decay are those before a schedule has its say."""
    lr, weight_decay = float(optim_cfg.LR), float(optim_cfg.WEIGHT_DECAY)
    beta1, beta2 = map(float, optim_cfg.BETAS or (0.9, 0.999))
    match optim_cfg.OPTIMIZER:
        case "adam_onecycle" | "adam_cosineanneal":
            # OpenPCDet decays by hand, then steps Adam without decay: that is AdamW, to 4e-16 in f64.
            betas = float(optim_cfg.MOMS[0]), beta2 if optim_cfg.BETAS else 0.99
            return OptimizerOptions("adamw", lr, weight_decay, betas)
        case "adamw" | "adam":
            return OptimizerOptions(optim_cfg.OPTIMIZER, lr, weight_decay, (beta1, beta2))
        case "sgd":
            return OptimizerOptions("sgd", lr, weight_decay, momentum=float(optim_cfg.MOMENTUM))
    raise ConfigError(
        f"OPTIMIZATION.OPTIMIZER is {optim_cfg.OPTIMIZER!r}; "
        "legal are adam, sgd, adam_onecycle, adam_cosineanneal and adamw"
    )


def unused_options(optim_cfg: Any) -> list[str]:
    """A line for the user if they set what the schedule sets instead."""
    betas, moms, scheduler = optim_cfg.BETAS, optim_cfg.MOMS, schedule_name(optim_cfg)
    if betas is None:
        return []
    if optim_cfg.OPTIMIZER == "sgd":
        return ["OPTIMIZATION.BETAS is not used: sgd has MOMENTUM"]
    if scheduler in CYCLING and betas[0] != moms[0]:
        return [
            f"the first of OPTIMIZATION.BETAS, {betas[0]:g}, is not used: {scheduler} moves beta1 between those of "
            f"MOMS, {moms[0]:g} and {moms[1]:g}"
        ]
    if optim_cfg.OPTIMIZER in TWO_GROUP_OPTIMIZERS and betas[0] != moms[0]:
        return [f"the first of OPTIMIZATION.BETAS, {betas[0]:g}, is not used: beta1 is the first of MOMS, {moms[0]:g}"]
    return []


def stepped_groups(model: nn.Module, optim_cfg: Any) -> list[list[nn.Parameter]]:
    """The trainable parameters of `model` in the groups, and the order, of the optimizer state.

    adam_onecycle and adam_cosineanneal have the groups of parameter_groups(); adam, adamw and sgd
    one, in the order of parameters(). With LEGACY_PARAM_GROUPS the two-group optimizers leave out
    what OpenPCDet leaves out; unstepped_parameters() lists it.
    """
    if not _trainable(model):
        raise TaskError(
            f"the model ({type(model).__name__}) has no trainable parameter, so there is nothing to train: "
            "assign its layers to self in build_model, and leave requires_grad on for what should be trained"
        )
    if optim_cfg.OPTIMIZER not in TWO_GROUP_OPTIMIZERS:
        return [list(_trainable(model))]
    groups = parameter_groups(model, bool(optim_cfg.LEGACY_PARAM_GROUPS))
    if not any(groups):
        raise ConfigError(
            "OPTIMIZATION.LEGACY_PARAM_GROUPS: true leaves out every parameter of this model; set it to false"
        )
    missing = [] if optim_cfg.LEGACY_PARAM_GROUPS else unstepped_parameters(model, groups)
    if missing:
        raise ConfigError(
            f"trainable parameters that no submodule holds would never be trained, {len(missing)} in all: "
            f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}. Assign them to self in the module "
            "that uses them, or set requires_grad to False"
        )
    return groups


def torch_optimizer(
    groups: Sequence[Sequence[nn.Parameter]], options: OptimizerOptions, fused: bool = False
) -> torch.optim.Optimizer:
    """Torch's own optimizer over `groups`. The first one in a process imports half of torch's compiler (1.6 s).

    fused: by its fused kernels; else as torch chooses
    """
    named = [{"params": list(group)} for group in groups]
    lr, weight_decay, chosen = options.lr, options.weight_decay, fused or None
    if options.kind == "sgd":
        return torch.optim.SGD(named, lr=lr, momentum=options.momentum, weight_decay=weight_decay, fused=chosen)
    kind = torch.optim.AdamW if options.kind == "adamw" else torch.optim.Adam
    return kind(named, lr=lr, betas=options.betas, eps=EPS, weight_decay=weight_decay, fused=chosen)


def torch_groups(sizes: Sequence[int], options: OptimizerOptions, last: StepSettings) -> list[dict[str, Any]]:
    """The param_groups of the state_dict that torch's optimizer would have over groups of these sizes.

    last: of the last step. A test holds this against torch.
    """
    own: dict[str, Any]
    lr, momentum, weight_decay = last.lr, last.momentum, last.weight_decay
    common = {"maximize": False, "foreach": None}
    if options.is_adam:
        beta1 = options.betas[0] if momentum is None else momentum
        own = {"lr": lr, "betas": (beta1, options.betas[1]), "eps": EPS, "weight_decay": weight_decay}
        own |= {"amsgrad": False, **common, "capturable": False, "differentiable": False, "fused": None}
        own |= {"decoupled_weight_decay": options.kind == "adamw"}
    else:
        own = {"lr": lr, "momentum": options.momentum if momentum is None else momentum, "dampening": 0}
        own |= {"weight_decay": weight_decay, "nesterov": False, **common}
        own |= {"differentiable": False, "fused": None}
    numbers = iter(range(sum(sizes)))
    return [{**own, "params": [next(numbers) for _ in range(size)]} for size in sizes]


def parameter_groups(model: nn.Module, legacy: bool) -> list[list[nn.Parameter]]:
    """[all but BatchNorm, BatchNorm], trainable parameters only, each once; either may be empty.

    In each group the parameters of modules without children come first, in OpenPCDet's order, so
    that the numbers in the optimizer state are OpenPCDet's. Those that stand directly on a module
    with children follow; OpenPCDet never trains these (10 % of DSVT's weights), nor does `legacy`.
    """
    leaves: list[nn.Module] = []
    parents: list[nn.Module] = []
    for module in _walk(model):
        (parents if any(True for _ in module.children()) else leaves).append(module)
    groups: list[list[nn.Parameter]] = [[], []]
    seen: set[nn.Parameter] = set()
    for module in leaves if legacy else leaves + parents:
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                groups[isinstance(module, _BatchNorm)].append(parameter)
    return groups


def unstepped_parameters(model: nn.Module, groups: Sequence[Sequence[nn.Parameter]]) -> list[str]:
    """Names of the trainable parameters of `model` that are in none of `groups`."""
    stepped = {parameter for group in groups for parameter in group}
    return [name for parameter, name in _trainable(model).items() if parameter not in stepped]


def set_schedule(optimizer: torch.optim.Optimizer, settings: StepSettings) -> None:
    """Puts lr, weight decay and momentum (beta1 of Adam; None leaves it) into all groups, as python floats.

    Numpy scalars here are what makes OpenPCDet's checkpoints unreadable to torch.load since 2.6.
    """
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = float(settings.lr), float(settings.weight_decay)
        if settings.momentum is None:
            continue
        if "betas" in group:
            group["betas"] = (float(settings.momentum), group["betas"][1])
        else:
            group["momentum"] = float(settings.momentum)


def checked_moments(
    state: Mapping[str, Any], own: Sequence[Mapping[str, Any]], parameters: Sequence[nn.Parameter]
) -> dict[int, Mapping[str, Any]]:
    """The entries of an optimizer state_dict, ours or OpenPCDet's, by the position in `parameters`.

    own: the param_groups of this run's state_dict. CheckpointError if the state belongs to another
    kind of optimizer or to another model.
    """
    if not {"state", "param_groups"} <= state.keys():
        raise CheckpointError(f"no optimizer state: found the keys {sorted(state)}, not state and param_groups")
    theirs = state["param_groups"]
    _check_same_kind(own, theirs)
    positions = {index: position for position, index in enumerate(_indices(theirs))}
    _check_same_shapes({index: parameters[position] for index, position in positions.items()}, state["state"])
    return {positions[index]: entry for index, entry in state["state"].items()}


def in_full_groups(state: Mapping[str, Any], model: nn.Module, optimizer: str) -> tuple[dict[str, Any], int]:
    """An OpenPCDet optimizer state as one of all parameters, and of how many it has no moments; 0: it is as it was.

    These are what OpenPCDet leaves out, and come last in their groups here.
    """
    sizes = [[len(group) for group in parameter_groups(model, legacy)] for legacy in (True, False)]
    groups = state.get("param_groups", [])
    if optimizer not in TWO_GROUP_OPTIMIZERS or sizes[0] == sizes[1] or sizes[0] != [len(g["params"]) for g in groups]:
        return dict(state), 0
    numbers: dict[int, int] = {}
    new, first = [], 0
    for group, size in zip(groups, sizes[1], strict=True):
        numbers |= {old: first + i for i, old in enumerate(group["params"])}
        new.append({**group, "params": list(range(first, first + size))})
        first += size
    moments = {numbers[old]: entry for old, entry in state["state"].items()}
    return {"state": moments, "param_groups": new}, sum(sizes[1]) - sum(sizes[0])


def in_legacy_groups(state: Mapping[str, Any], model: nn.Module, optimizer: str) -> dict[str, Any]:
    """The reverse: an optimizer state of ours without what OpenPCDet would not find in its own groups."""
    sizes = [len(group) for group in parameter_groups(model, legacy=True)]
    if optimizer not in TWO_GROUP_OPTIMIZERS:
        return dict(state)
    kept = [group["params"][:size] for group, size in zip(state["param_groups"], sizes, strict=True)]
    numbers = {old: new for new, old in enumerate(number for group in kept for number in group)}
    groups = [
        {**group, "params": [numbers[old] for old in numbers_of_group]}
        for group, numbers_of_group in zip(state["param_groups"], kept, strict=True)
    ]
    return {"state": {numbers[old]: e for old, e in state["state"].items() if old in numbers}, "param_groups": groups}


def _walk(module: nn.Module) -> Iterable[nn.Module]:
    """Every module below and including `module`, children in order and before their parent."""
    for child in module.children():
        yield from _walk(child)
    yield module


def _trainable(model: nn.Module) -> dict[nn.Parameter, str]:
    """Trainable parameter -> its (first) name, in the order of parameters()."""
    return {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _indices(groups: Iterable[Mapping[str, Any]]) -> list[int]:
    return [index for group in groups for index in group["params"]]


def _check_same_kind(own: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> None:
    kinds = ["Adam" if any("betas" in group for group in groups) else "SGD" for groups in (theirs, own)]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"the checkpoint holds the state of {kinds[0]}, but this run steps with {kinds[1]}: "
            "set OPTIMIZATION.OPTIMIZER to what the checkpoint was trained with, or load only its weights"
        )
    counts = [[len(group["params"]) for group in groups] for groups in (theirs, own)]
    if counts[0] != counts[1]:
        raise CheckpointError(
            f"the optimizer state in the checkpoint is of {counts[0]} parameters (by group), this run steps "
            f"{counts[1]}: the model or OPTIMIZATION.OPTIMIZER differs. To go on with an OpenPCDet run of a model "
            "that it trains only in part, set OPTIMIZATION.LEGACY_PARAM_GROUPS: true"
        )


def _check_same_shapes(parameters: Mapping[int, nn.Parameter], moments: Mapping[int, Mapping[str, Any]]) -> None:
    for index, entry in moments.items():
        if index not in parameters:
            raise CheckpointError(f"the optimizer state in the checkpoint has moments of parameter {index}, not listed")
        shape = parameters[index].shape
        for name, value in entry.items():
            if torch.is_tensor(value) and value.dim() and value.shape != shape:
                raise CheckpointError(
                    f"the optimizer state in the checkpoint: {name} of parameter {index} is {tuple(value.shape)}, "
                    f"but that parameter is {tuple(shape)} in this model: the model has changed"
                )


def clip_gradients(
    parameters: Iterable[torch.Tensor], max_norm: float | None, norm: torch.Tensor | None = None
) -> torch.Tensor:
    """The L2 norm over all gradients before clipping: a scalar on their device, without a host sync.

    The gradients are scaled in place by min(1, max_norm / (norm + 1e-6)), as clip_grad_norm_ does;
    not at all if max_norm is None. A norm that is not finite makes every gradient so: look at it
    before the step. Pass exactly the parameters that are stepped: gradients that no step uses and
    no step zeroes would shrink all others.

    norm: if it is known already
    """
    stepped = list(parameters)
    if norm is None:
        norm = get_total_norm([p.grad for p in stepped if p.grad is not None])
    if max_norm is not None:
        clip_grads_with_norm_(stepped, max_norm, norm)
    return norm
