"""Real torch optimizers for OPTIMIZATION, every trainable parameter in exactly one group.

Mathematics and group order are OpenPCDet's (tests/golden/toy holds runs of its own code).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # 1d, 2d, 3d and both synchronised ones

from raytrain.errors import CheckpointError, ConfigError, TaskError

TWO_GROUP_OPTIMIZERS = ("adam_onecycle", "adam_cosineanneal")


def build_optimizer(model: nn.Module, optim_cfg: Any) -> torch.optim.Optimizer:
    """The torch optimizer that OPTIMIZATION names, over every trainable parameter of `model`.

    adam_onecycle and adam_cosineanneal are AdamW with the groups of parameter_groups(); their
    learning rate and beta1 come from the schedule before each step. adam, adamw and sgd have one
    group in the order of parameters(). With LEGACY_PARAM_GROUPS the two-group optimizers leave
    out what OpenPCDet leaves out; unstepped_parameters() lists it.
    """
    if not _trainable(model):
        raise TaskError(
            f"the model ({type(model).__name__}) has no trainable parameter, so there is nothing to train: "
            "assign its layers to self in build_model, and leave requires_grad on for what should be trained"
        )
    if optim_cfg.OPTIMIZER in TWO_GROUP_OPTIMIZERS:
        legacy = bool(optim_cfg.LEGACY_PARAM_GROUPS)
        groups = parameter_groups(model, legacy)
    else:
        legacy = False
        groups = [list(_trainable(model))]
    if not any(groups):
        raise ConfigError(
            "OPTIMIZATION.LEGACY_PARAM_GROUPS: true leaves out every parameter of this model; set it to false"
        )
    optimizer = _make_optimizer([{"params": group} for group in groups], optim_cfg)
    missing = [] if legacy else unstepped_parameters(model, optimizer)
    if missing:
        raise ConfigError(
            f"trainable parameters that no submodule holds would never be trained, {len(missing)} in all: "
            f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}. Assign them to self in the module "
            "that uses them, or set requires_grad to False"
        )
    return optimizer


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


def unstepped_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the trainable parameters of `model` that `optimizer` does not step."""
    stepped = set(stepped_parameters(optimizer))
    return [name for parameter, name in _trainable(model).items() if parameter not in stepped]


def stepped_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that `optimizer` steps, in the order of its state: what is to be clipped."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def set_schedule(optimizer: torch.optim.Optimizer, lr: float, momentum: float | None) -> None:
    """Puts lr and momentum (beta1 of Adam; None leaves it) into all groups, as python floats.

    Numpy scalars here are what makes OpenPCDet's checkpoints unreadable to torch.load since 2.6.
    """
    for group in optimizer.param_groups:
        group["lr"] = float(lr)
        if momentum is None:
            continue
        if "betas" in group:
            group["betas"] = (float(momentum), group["betas"][1])
        else:
            group["momentum"] = float(momentum)


def import_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Loads the moments of an optimizer state_dict, ours or OpenPCDet's, into `optimizer`.

    Learning rate, betas, weight decay and all other options stay as this run's config made them.
    CheckpointError if the state belongs to another kind of optimizer or to another model; then
    `optimizer` is as it was. The tensors of `state` are copied.
    """
    if not {"state", "param_groups"} <= state.keys():
        raise CheckpointError(f"no optimizer state: found the keys {sorted(state)}, not state and param_groups")
    own = optimizer.state_dict()["param_groups"]
    theirs = state["param_groups"]
    _check_same_kind(own, theirs)
    parameters = dict(zip(_indices(theirs), stepped_parameters(optimizer), strict=True))
    _check_same_shapes(parameters, state["state"])
    moments = {
        index: {name: value.clone() if torch.is_tensor(value) else value for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    groups = [{**ours, "params": group["params"]} for ours, group in zip(own, theirs, strict=True)]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _make_optimizer(groups: Iterable[dict[str, Any]], optim_cfg: Any) -> torch.optim.Optimizer:
    lr, weight_decay = float(optim_cfg.LR), float(optim_cfg.WEIGHT_DECAY)
    beta1, beta2 = map(float, optim_cfg.BETAS or (0.9, 0.999))
    match optim_cfg.OPTIMIZER:
        case "adam_onecycle" | "adam_cosineanneal":
            # OpenPCDet decays by hand, then steps Adam without decay: that is AdamW, to 4e-16 in f64.
            betas = (float(optim_cfg.MOMS[0]), beta2 if optim_cfg.BETAS else 0.99)
            return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay)
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)
        case "adam":
            return torch.optim.Adam(groups, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)
        case "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=float(optim_cfg.MOMENTUM), weight_decay=weight_decay)
    raise ConfigError(
        f"OPTIMIZATION.OPTIMIZER is {optim_cfg.OPTIMIZER!r}; "
        "legal are adam, sgd, adam_onecycle, adam_cosineanneal and adamw"
    )


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


def _check_same_kind(own: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
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
