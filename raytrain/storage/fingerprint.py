"""The fingerprint of a state: equal for two checkpoints exactly where all tensors of model and optimizer are.

It is taken of the bytes of a checkpoint.pth, without torch: the keeper, which writes them, has none. A tensor counts by
name, dtype, shape, and its bytes in logical order: NaN and -0 as the bits that they are. Its strides, its place in the
file, the order of names, the device and whatever else is saved do not count, nor does what is no tensor. Moments of
the optimizer go by the name of their parameter, since each optimizer numbers them by groups of its own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from raytrain.errors import CheckpointError
from raytrain.storage.archive import Archive
from raytrain.storage.pickled import Made, Named, Persistent, described

DIGITS = 12  # that people are shown: two states that differ agree in them once in 3e14 times
SIZES = {  # of one element, in bytes
    **dict.fromkeys(("complex128",), 16),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32", "complex32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
}
STORAGES = dict(  # what is kept in a torch.FloatStorage, by the name of that
    [
        *(("Double", "float64"), ("Float", "float32"), ("Half", "float16"), ("BFloat16", "bfloat16")),
        *(("ComplexDouble", "complex128"), ("ComplexFloat", "complex64"), ("Bool", "bool"), ("Byte", "uint8")),
        *(("Long", "int64"), ("Int", "int32"), ("Short", "int16"), ("Char", "int8")),
    ]
)


class TensorName(NamedTuple):
    """Of the model's tensor `owner`, or of what the optimizer keeps of it: its `moment` (exp_avg, step)."""

    owner: str
    moment: str = ""

    def __str__(self) -> str:
        return f"{self.moment} of {self.owner}" if self.moment else self.owner


class Print(NamedTuple):
    """What of one tensor counts. digest: of its bytes in logical order"""

    dtype: str
    shape: tuple[int, ...]
    digest: str


class Prints(NamedTuple):
    """Of all tensors of one checkpoint, the model's first.

    moments:    by the parameter's number in the optimizer's state
    parameters: the names of those numbers; none in a file of an earlier version, or of another program
    step:       steps taken, where the file says so
    """

    model: dict[str, Print]
    moments: dict[tuple[int, str], Print]
    parameters: list[str]
    step: int | None

    def by_name(self, numbered: bool = False) -> dict[TensorName, Print]:
        """numbered: with the optimizer's numbers in place of names, as where they are compared with a file without."""
        names = [] if numbered else self.parameters
        owned = {TensorName(owner_of(n, names), moment): print_ for (n, moment), print_ in self.moments.items()}
        return {**{TensorName(name): print_ for name, print_ in self.model.items()}, **owned}

    def fingerprint(self, numbered: bool = False) -> str:
        """As it stands in a manifest: 64 digits."""
        lines = [json.dumps([name.moment, name.owner, *print_]) for name, print_ in self.by_name(numbered).items()]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def prints_of(data: memoryview) -> Prints:
    """Those of a checkpoint.pth, ours or OpenPCDet's; a CheckpointError says why there are none."""
    archive = Archive(data)
    payload = described(bytes(archive.part("data.pkl")))
    if not isinstance(payload, dict) or not isinstance(payload.get("model_state"), dict):
        raise CheckpointError("it should hold a dict with 'model_state'")
    try:
        model, moments = tensors_in(payload, functools.partial(_plain_tensor, archive=archive))
    except RecursionError as error:
        raise CheckpointError("what it holds is nested too deep") from error
    parameters = _at(payload, "raytrain", "parameters") or []
    step = _at(payload, "raytrain", "progress", "step", default=payload.get("it"))
    return Prints(
        {name: print_of(tensor) for name, tensor in model.items()},
        {key: print_of(tensor) for key, tensor in moments.items()},
        list(map(str, parameters)),
        step if type(step) is int else None,
    )


def fingerprint_of(data: memoryview) -> str:
    """Of a checkpoint.pth; "" where it holds what has none: it can be saved all the same."""
    try:
        return prints_of(data).fingerprint()
    except CheckpointError:
        return ""


def tensors_in(payload: Mapping[str, Any], as_tensor: Callable[[Any], Any]) -> tuple[dict[str, Any], dict[Any, Any]]:
    """The model's tensors by name, and the optimizer's by (number, name of the moment).

    as_tensor: gives a value as a tensor, None if it is none; what is not is looked into
    """
    model, moments = {}, {}
    for path, tensor in _below(payload["model_state"], as_tensor, set()):
        model[".".join(path)] = tensor
    state = _at(payload, "optimizer_state", "state")
    for number, entry in (state if isinstance(state, dict) else {}).items():
        for path, tensor in _below(entry, as_tensor, set()):
            moments[number, ".".join(path)] = tensor
    return model, moments


def owner_of(number: Any, parameters: list[str]) -> str:
    """The name of a parameter that the optimizer has by number."""
    known = isinstance(number, int) and 0 <= number < len(parameters)
    return parameters[number] if known else f"parameter {number}"


class _PlainTensor(NamedTuple):
    """A tensor as a file has it. offset: in elements"""

    memory: memoryview
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def print_of(tensor: _PlainTensor) -> Print:
    return Print(tensor.dtype, tensor.shape, hashlib.sha256(_logical_bytes(tensor)).hexdigest())


def _logical_bytes(tensor: _PlainTensor) -> Any:
    """The tensor's bytes as if it were contiguous: a part of the file where it is."""
    size, count = SIZES[tensor.dtype], math.prod(tensor.shape)
    if count == 0:
        return b""
    if tensor.stride == _contiguous(tensor):
        part = tensor.memory[tensor.offset * size : (tensor.offset + count) * size]
        if len(part) < count * size:
            raise CheckpointError("a tensor in it is larger than its memory")
        return part
    import numpy as np  # the keeper begins without it, and most states need none

    strides = [step * size for step in tensor.stride]
    try:
        view = np.ndarray(tensor.shape, f"V{size}", tensor.memory, tensor.offset * size, strides)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"a tensor in it is larger than its memory: {error}") from error
    return np.ascontiguousarray(view).reshape(-1).view(np.uint8).data


def _contiguous(tensor: _PlainTensor) -> tuple[int, ...]:
    """The strides that it would have; what it has where they do not matter."""
    wanted, step = [], 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        wanted.append(stride if length == 1 else step)
        step *= length
    return tuple(reversed(wanted))


def _plain_tensor(value: Any, archive: Archive) -> _PlainTensor | None:
    """The tensor that torch would rebuild of this, if it is one of values alone."""
    kind = value.of.path if isinstance(value, Made) and isinstance(value.of, Named) else ""
    if kind == "torch._utils._rebuild_parameter":
        return _plain_tensor(value.arguments[0], archive)
    if kind not in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
        return None
    try:
        storage, offset, shape, stride, *rest = value.arguments
        (_, storage_kind, key, *_), counts = storage.description, (offset, *shape, *stride)
        dtype = _dtype_of(rest[2] if kind.endswith("v3") else storage_kind)
        if not all(type(count) is int and count >= 0 for count in counts) or len(shape) != len(stride):
            raise ValueError("its shape is none")
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"a tensor in it is described in an unknown way: {error}") from error
    return _PlainTensor(archive.part(f"data/{key}"), dtype, offset, tuple(shape), tuple(stride))


def _dtype_of(named: Named) -> str:
    """Of `torch.FloatStorage`, or `torch.uint16`."""
    name = named.path.removeprefix("torch.")
    dtype = STORAGES.get(name.removesuffix("Storage"), name)
    if dtype not in SIZES:
        raise CheckpointError(f"it holds tensors of {named.path}, which have no fingerprint")
    return dtype


def _below(value: Any, as_tensor: Callable[[Any], Any], seen: set[int]) -> Iterator[tuple[list[str], Any]]:
    """All tensors in a value, with the keys that lead there. What is in two places of it is in the first one."""
    tensor = as_tensor(value)
    if tensor is not None:
        yield [], tensor
        return
    parts = value.arguments if isinstance(value, Made) else value
    if not isinstance(parts, (dict, list, tuple)) or isinstance(value, (Named, Persistent)) or id(value) in seen:
        return
    seen.add(id(value))
    for key, part in parts.items() if isinstance(parts, dict) else enumerate(parts):
        for path, tensor in _below(part, as_tensor, seen):
            yield [str(key), *path], tensor


def _at(tree: Any, *keys: str, default: Any = None) -> Any:
    """What these keys lead to."""
    for key in keys:
        if not isinstance(tree, dict) or key not in tree:
            return default
        tree = tree[key]
    return tree
