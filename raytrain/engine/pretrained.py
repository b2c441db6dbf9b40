"""Weights that another program saved: found in what they are wrapped in, and called as this model calls them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from raytrain.errors import CheckpointError, listed
from raytrain.storage.state_file import load_file

# Where programs put their weights: OpenPCDet and raytrain, Lightning and MMDetection, Detectron2 and fairseq, others.
WRAPPINGS = ("model_state", "state_dict", "model", "model_state_dict", "module", "net", "weights")
WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel's and torch.compile's, anywhere in a name
ENOUGH = 0.5  # of a file's tensors; of one that fits less, most is of another model


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What became of a file of weights.

    taken:   names of the model's tensors that it gave
    left:    of those that stay as built, with why
    unused:  names in the file that no tensor of the model has
    found:   where in the file they were, and how their names were changed; "" if neither
    """

    taken: list[str]
    left: list[str]
    unused: list[str]
    found: str

    def notes(self, path: str) -> list[str]:
        """What a user should know, a line each."""
        total = len(self.taken) + len(self.left)
        lines = [f"took {len(self.taken)} of {total} tensors from {path}{f' ({self.found})' if self.found else ''}"]
        if self.left:
            lines[0] += f"; left as built: {listed(self.left)}"
        if self.unused:
            lines.append(f"{len(self.unused)} tensors of {path} are not of this model: {listed(self.unused)}")
        return lines


def load_pretrained(model: torch.nn.Module, path: str, allow_partial: bool = False) -> Pretrained:
    """Take over the tensors of a file whose name and shape fit.

    CheckpointError, and nothing is taken, if none fits; or less than half of them, unless `allow_partial`.
    """
    state, key = weights_in(load_file(path), path)
    own = model.state_dict()
    rename, how = renaming(state, own)
    renamed, turned = in_todays_layout(model, {rename(name): value for name, value in state.items()})
    fitting = {name: value for name, value in renamed.items() if fits(value, own.get(name))}
    left = [left_line(name, renamed.get(name), own[name]) for name in own if name not in fitting]
    unused = [name for name in state if rename(name) not in own]
    if not fitting:
        raise CheckpointError(
            f"--pretrained_model {path}: none of its {len(state)} tensors fits this model. "
            f"It has {listed(state) or 'nothing'}; the model has {listed(own) or 'nothing'}"
        )
    if len(fitting) < ENOUGH * len(state) and not allow_partial:
        raise CheckpointError(
            f"--pretrained_model {path}: only {len(fitting)} of its {len(state)} tensors fit this model "
            f"({listed(fitting) or 'nothing'}); left as built would be {listed(left) or 'nothing'}; not of this model: "
            f"{listed(unused) or 'nothing'}. "
            "Rename them, or take what fits all the same (--allow-partial)"
        )
    model.load_state_dict({**own, **fitting})
    found = [key and f"under {key!r}", how, f"{len(turned)} from spconv 1's layout" if turned else ""]
    return Pretrained(list(fitting), left, unused, ", ".join(filter(None, found)))


def in_todays_layout(model: torch.nn.Module, state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`state` with weights of spconv 1 as spconv 2 has them, and their names.

    spconv 1 has a sparse convolution's weight as (k, ..., c_in, c_out), spconv 2 as (c_out, k, ..., c_in), or, by one
    of its algorithms, as (k, ..., c_out, c_in). As OpenPCDet tells them apart: by the shape, if it is not the model's.
    """
    found = dict(state)
    for name, own in sparse_weights(model).items():
        value = state.get(name)
        if isinstance(value, torch.Tensor) and value.shape != own.shape and value.dim() == own.dim() > 2:
            layouts = (value.transpose(-1, -2), value.movedim(-1, 0))
            found[name] = next((each.contiguous() for each in layouts if each.shape == own.shape), value)
    return found, [name for name in state if found[name] is not state[name]]


def sparse_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model's sparse convolutions, of spconv's own classes and what is derived from them."""
    return {
        f"{name}.weight".lstrip("."): module.weight
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
        and any(kind.__module__.partition(".")[0] == "spconv" for kind in type(module).__mro__)
    }


def weights_in(content: Any, path: str) -> tuple[dict[str, Any], str]:
    """The tensors by name in what a file holds, and under which key they were; "" if it is nothing but them."""
    if isinstance(content, Mapping):
        for key in WRAPPINGS:
            inner = content.get(key)
            if isinstance(inner, Mapping) and any(isinstance(value, torch.Tensor) for value in inner.values()):
                return dict(inner), key
        tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
        if tensors:
            return tensors, ""
    holds = f"the keys {list(content)[:8]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise CheckpointError(
        f"--pretrained_model {path}: it holds no weights, but {holds}; give a file with a state_dict, bare or under "
        f"one of {', '.join(WRAPPINGS)}"
    )


def renaming(state: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[Callable[[str], str], str]:
    """How the names of a file become the model's, by which most tensors fit, and that in words; "" if by none."""
    plain = {unwrapped(name): name for name in own}  # a model may be wrapped, too

    def named(change: Callable[[str], str]) -> Callable[[str], str]:
        return lambda name: name if name in own else plain.get(change(unwrapped(name)), change(unwrapped(name)))

    best, how, most = named(lambda name: name), "", -1
    for change, words in changes(state, plain):
        rename = named(change)
        fit = sum(fits(value, own.get(rename(name))) for name, value in state.items())
        if fit > most:
            best, how, most = rename, words, fit
    wrappers = [wrapper for wrapper in WRAPPERS if any(wrapper in name and name not in own for name in state)]
    return best, ", ".join(filter(None, [*(f"without {wrapper!r}" for wrapper in wrappers), how]))


def changes(state: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[tuple[Callable[[str], str], str]]:
    """Ways to change names: none, one common prefix less, one more; the shortest first."""
    yield lambda name: name, ""
    for prefix in prefixes(unwrapped(name) for name in state):
        yield lambda name, prefix=prefix: name.removeprefix(prefix), f"without {prefix!r}"  # type: ignore[misc]
    for prefix in prefixes(own):
        yield lambda name, prefix=prefix: prefix + name, f"with {prefix!r} before"  # type: ignore[misc]


def prefixes(names: Any) -> list[str]:
    """Each dotted beginning of several names, the shortest first."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        for length in range(1, min(len(parts), 4)):
            prefix = ".".join(parts[:length]) + "."
            counts[prefix] = counts.get(prefix, 0) + 1
    return sorted((prefix for prefix, count in counts.items() if count > 1), key=lambda prefix: prefix.count("."))


def unwrapped(name: str) -> str:
    """Without what DistributedDataParallel and torch.compile put into it."""
    name = name.removeprefix(WRAPPERS[0])
    return name.replace(WRAPPERS[1], "").removeprefix(WRAPPERS[0])


def fits(value: Any, own: Any) -> bool:
    if isinstance(value, torch.Tensor) and isinstance(own, torch.Tensor):
        return value.shape == own.shape
    return own is not None and not isinstance(value, torch.Tensor) and not isinstance(own, torch.Tensor)


def left_line(name: str, value: Any, own: Any) -> str:
    if isinstance(value, torch.Tensor) and isinstance(own, torch.Tensor):
        return f"{name} ({tuple(value.shape)} in the file, {tuple(own.shape)} in the model)"
    return name
