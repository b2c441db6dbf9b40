"""Two states have one fingerprint exactly where all tensors of model and optimizer are the same bits."""

from __future__ import annotations

import copy
import hashlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optimization import optim_cfg, settings
from torch import nn

from raytrain.engine.engine import Engine
from raytrain.engine.world import World
from raytrain.errors import CheckpointError
from raytrain.storage.archive import Archive
from raytrain.storage.file_layout import FileLayout, leaves_of
from raytrain.storage.fingerprint import Print, Prints, TensorName, fingerprint_of, prints_of
from raytrain.storage.state_file import dumps

NAMES = ["conv.weight", "conv.bias"]


def payload() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    model = {"conv.weight": drawn(6, 4, 3, 3), "conv.bias": drawn(6), "count": torch.tensor(7), "none": drawn(0, 3)}
    state = {i: {"step": torch.tensor(3.0), "exp_avg": drawn(*model[name].shape)} for i, name in enumerate(NAMES)}
    groups = [{"lr": 0.1, "params": [0, 1]}]
    return {
        "epoch": 1,
        "it": 3,
        "model_state": model,
        "optimizer_state": {"state": state, "param_groups": groups},
        "raytrain": {"progress": {"epoch": 0, "cursor": 12, "step": 3}, "parameters": NAMES, "best": None},
    }


def saved(state: dict[str, Any], zipped: bool = True) -> bytes:
    """As other programs save it: a part of a larger memory with all of that."""
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def prints(of: dict[str, Any]) -> Prints:
    return prints_of(memoryview(dumps(of)))


def fingerprint(of: dict[str, Any]) -> str:
    return prints(of).fingerprint()


def channels_last(state: dict[str, Any]) -> None:
    weight = state["model_state"]["conv.weight"]
    state["model_state"]["conv.weight"] = weight.contiguous(memory_format=torch.channels_last)
    assert not state["model_state"]["conv.weight"].is_contiguous()


def part_of_a_larger_memory(state: dict[str, Any]) -> None:
    flat = torch.cat([torch.ones(5), state["model_state"]["conv.bias"]])
    state["model_state"]["conv.bias"] = flat[5:]


def transposed(state: dict[str, Any]) -> None:
    state["model_state"]["conv.weight"] = state["model_state"]["conv.weight"].permute(3, 0, 2, 1).contiguous()
    state["model_state"]["conv.weight"] = state["model_state"]["conv.weight"].permute(1, 3, 2, 0)


def other_order_of_names(state: dict[str, Any]) -> None:
    state["model_state"] = dict(reversed(state["model_state"].items()))


def other_groups_of_the_optimizer(state: dict[str, Any]) -> None:
    moments = state["optimizer_state"]["state"]
    state["optimizer_state"] = {"state": {0: moments[1], 1: moments[0]}, "param_groups": []}
    state["raytrain"]["parameters"] = NAMES[::-1]


def as_parameters(state: dict[str, Any]) -> None:
    state["model_state"] = {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in state["model_state"].items()}


def whatever_else_is_saved(state: dict[str, Any]) -> None:
    state["model_state"]["_extra_state"] = {"calls": 12}
    state["raytrain"] |= {"own": {"queue": torch.ones(9)}, "best": {"epoch": 1}}
    state["optimizer_state"]["param_groups"][0]["lr"] = 0.2
    state["epoch"] = 2


@pytest.mark.parametrize(
    "change",
    [
        *(channels_last, part_of_a_larger_memory, transposed, other_order_of_names, other_groups_of_the_optimizer),
        *(as_parameters, whatever_else_is_saved),
    ],
)
def test_how_it_lies_in_memory_and_file_does_not_count(change: Callable[[dict[str, Any]], None]) -> None:
    state = payload()
    change(state)
    assert saved(state) != saved(payload())
    assert fingerprint_of(memoryview(saved(state))) == fingerprint(state) == fingerprint(payload())


def one_bit(state: dict[str, Any]) -> None:
    state["model_state"]["conv.weight"].view(torch.int32)[2, 1, 0, 2] ^= 1


def the_sign_of_zero(state: dict[str, Any]) -> None:
    state["model_state"]["conv.bias"][0] = -0.0


def another_nan(state: dict[str, Any]) -> None:
    state["model_state"]["conv.bias"].view(torch.int32)[1] = 0x7FC00001


def another_name(state: dict[str, Any]) -> None:
    state["model_state"]["conv.offset"] = state["model_state"].pop("conv.bias")


def another_shape(state: dict[str, Any]) -> None:
    state["model_state"]["conv.weight"] = state["model_state"]["conv.weight"].reshape(4, 6, 3, 3)


def another_dtype_of_the_same_bytes(state: dict[str, Any]) -> None:
    state["model_state"]["conv.weight"] = state["model_state"]["conv.weight"].view(torch.int32)


def another_moment(state: dict[str, Any]) -> None:
    state["optimizer_state"]["state"][1]["exp_avg"][0] += 1


def one_moment_less(state: dict[str, Any]) -> None:
    del state["optimizer_state"]["state"][1]


def moments_of_the_other_parameter(state: dict[str, Any]) -> None:
    state["raytrain"]["parameters"] = NAMES[::-1]


@pytest.mark.parametrize(
    "change",
    [
        *(one_bit, the_sign_of_zero, another_nan, another_name, another_shape, another_dtype_of_the_same_bytes),
        *(another_moment, one_moment_less, moments_of_the_other_parameter),
    ],
)
def test_every_bit_name_shape_and_dtype_counts(change: Callable[[dict[str, Any]], None]) -> None:
    before, after = payload(), payload()
    for state in (before, after):
        state["model_state"]["conv.bias"][:2] = torch.tensor([0.0, float("nan")])
    change(after)
    assert fingerprint(after) != fingerprint(before)


def test_the_parts_are_named_and_hashed_as_torch_would_read_them() -> None:
    state = payload()
    channels_last(state)
    found = prints(state)
    assert (found.step, found.parameters) == (3, NAMES)
    named = found.by_name()
    assert list(map(str, named)) == [
        *("conv.weight", "conv.bias", "count", "none"),
        *("step of conv.weight", "exp_avg of conv.weight", "step of conv.bias", "exp_avg of conv.bias"),
    ]
    weight = state["model_state"]["conv.weight"].contiguous().numpy().tobytes()
    assert named[TensorName("conv.weight")] == Print("float32", (6, 4, 3, 3), hashlib.sha256(weight).hexdigest())
    assert named[TensorName("count")].dtype == "int64" and named[TensorName("none")].shape == (0, 3)


DTYPES = [
    *(torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_has_one_in_any_order_of_memory(dtype: torch.dtype) -> None:
    values = torch.arange(24).remainder(5).to(dtype).view(2, 3, 4)
    strided = torch.empty_strided((2, 3, 4), (1, 2, 6), dtype=dtype).copy_(values)
    plain, other = (prints({"model_state": {"w": each}}).model["w"] for each in (values, strided))
    assert plain == other and f"torch.{plain.dtype}" == str(dtype)
    assert plain.digest == hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()


def test_a_state_in_the_keepers_memory_has_that_of_its_file() -> None:
    state = payload()
    layout = FileLayout(leaves_of(state))
    memory = memoryview(bytearray(layout.size_bytes))
    layout.write_into(memory).fill(leaves_of(state))
    assert fingerprint_of(memory) == fingerprint(state) != ""


def test_an_older_file_has_numbers_in_place_of_names() -> None:
    state = payload()
    del state["raytrain"]["parameters"]
    found = prints(state)
    assert [str(name) for name in found.by_name()][-1] == "exp_avg of parameter 1"
    assert found.fingerprint() == prints(payload()).fingerprint(numbered=True) != fingerprint(payload())


def test_tensors_in_other_containers_and_sparse_ones_count_too() -> None:
    def states(value: float) -> list[dict[str, Any]]:
        sparse = torch.tensor([[0.0, value], [1.0, 0.0]]).to_sparse()
        extra = {"model_state": {"_extra_state": {"scales": [torch.tensor(value)]}}}
        return [{"model_state": {"w": sparse.coalesce()}}, extra]

    assert list(prints(states(2.0)[1]).model) == ["_extra_state.scales.0"]
    for same, also, other in zip(states(2.0), states(2.0), states(3.0), strict=True):
        assert fingerprint(same) == fingerprint(also) != fingerprint(other)


class Net(nn.Module):
    """BatchNorm, whose parameters adam_onecycle has in a group of their own; channels_last weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).square().mean()


def state_of(model: nn.Module, engine: Engine) -> dict[str, Any]:
    optimizer = engine.optimizer_state(live=True)
    return {
        "model_state": model.state_dict(),
        "optimizer_state": optimizer,
        "raytrain": {"parameters": engine.stepped_names},
    }


def test_engines_and_the_groups_of_optimizers_have_one_for_the_same_state() -> None:
    torch.manual_seed(0)
    model = Net()
    engine = Engine(model, optim_cfg(OPTIMIZER="adamw", LR=0.1), World())
    for _ in range(2):
        engine.zero_grad()
        engine.backward(model(torch.rand(2, 3, 8, 8)), 1.0)
        engine.step(settings(), [])
    assert engine.stepper.kind == "flat"
    before, moments = state_of(model, engine), engine.optimizer_state()
    wanted = fingerprint(before)

    per_parameter = Net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    per_parameter.load_state_dict(model.state_dict())
    ddp = Engine(per_parameter, optim_cfg(OPTIMIZER="adamw", LR=0.1, ENGINE="ddp"), World())
    ddp.load_optimizer_state(moments)
    assert ddp.stepper.kind == "ddp"
    assert fingerprint(state_of(per_parameter, ddp)) == wanted

    grouped = Engine(copy.deepcopy(per_parameter), optim_cfg(OPTIMIZER="adam_onecycle", LR=0.1), World())
    assert (
        sorted(grouped.stepped_names) == sorted(engine.stepped_names) and grouped.stepped_names != engine.stepped_names
    )
    numbers = [engine.stepped_names.index(name) for name in grouped.stepped_names]
    regrouped = {new: moments["state"][old] for new, old in enumerate(numbers)}
    grouped.load_optimizer_state({**grouped.optimizer_state(), "state": regrouped})
    assert fingerprint(state_of(grouped.model, grouped)) == wanted


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no archive of torch.save"),
        (b"PK" + bytes(400), "no archive of torch.save"),
        (saved({"model_state": {}}, zipped=False), "no archive of torch.save"),
        (dumps({"state_dict": {}}), "it should hold a dict with 'model_state'"),
        (dumps({"model_state": [1]}), "it should hold a dict with 'model_state'"),
    ],
)
def test_what_is_no_state_says_so_and_is_saved_without_one(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        prints_of(memoryview(data))
    assert fingerprint_of(memoryview(data)) == ""


def test_a_damaged_file_is_an_error_and_nothing_worse() -> None:
    sound = dumps(payload())
    for position in range(0, len(sound), 7):
        damaged = bytearray(sound)
        damaged[position] ^= 0xFF
        fingerprint_of(memoryview(damaged))
    for length in range(0, len(sound), 97):
        fingerprint_of(memoryview(sound)[:length])


def test_a_tensor_that_reaches_beyond_its_memory_is_refused() -> None:
    sound = dumps({"model_state": {"w": torch.ones(8)}})
    pickled = bytes(Archive(memoryview(sound)).part("data.pkl"))
    assert pickled.count(b"K\x08") == 2  # the numbers of elements: of the memory, of the tensor
    at = sound.index(pickled) + pickled.rindex(b"K\x08")
    too_large = bytearray(sound)
    too_large[at + 1] = 9
    with pytest.raises(CheckpointError, match="larger than its memory"):
        prints_of(memoryview(too_large))


def test_the_keeper_takes_it_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(dumps(payload()))
    code = (
        "import pathlib, sys; from raytrain.storage.fingerprint import fingerprint_of;"
        f"data = pathlib.Path({str(path)!r}).read_bytes();"
        "print(fingerprint_of(memoryview(data)), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [fingerprint(payload()), "False"]
