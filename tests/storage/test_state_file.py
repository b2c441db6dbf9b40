"""checkpoint.pth laid out once and filled in again and again: what is read back is what torch.save would have kept."""

from __future__ import annotations

import io
import math
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from raytrain.errors import CheckpointError
from raytrain.storage.file_layout import LARGE_BYTES, FileLayout, IrregularPayload, leaves_of
from raytrain.storage.state_file import check_loadable, dumps, loads

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def payload(step: int, scale: float = 1.0) -> dict[str, Any]:
    flat = torch.arange(24.0) * scale
    tied = flat[:6].view(2, 3)
    tensors = {str(dtype): (torch.arange(5) * scale).to(dtype) for dtype in DTYPES}
    return {
        "epoch": step // 10,
        "it": step,
        "model_state": {
            "part": flat[6:12],
            "strided": (torch.arange(24.0) * scale).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
            "tied.a": tied,
            "tied.b": tied,
            "none": torch.zeros(0, 3),
            "one": torch.tensor(scale),
            **tensors,
        },
        "optimizer_state": {
            "state": {0: {"step": torch.tensor(float(step)), "exp_avg": flat[12:18]}},
            "param_groups": [
                {"lr": 0.1 / step, "betas": (0.9, 0.99 - step / 1000), "params": [0, 1], "amsgrad": False}
            ],
        },
        "raytrain": {"seed": 2**32 - 1, "best": {"step": step, "metrics": {"a": -1.5e300 * scale}}, "text": "x" * step},
    }


def filled(layout: FileLayout, *payloads: dict[str, Any]) -> memoryview:
    memory = memoryview(bytearray(layout.size_bytes))
    buffer = layout.write_into(memory)
    for each in payloads:
        buffer.fill(leaves_of(each))
    return memory


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == expected


def test_what_was_filled_in_last_comes_back_bit_for_bit() -> None:
    layout = FileLayout(leaves_of(payload(1)))
    later = {**payload(70_000, 2.0), "raytrain": {**payload(70_000, 2.0)["raytrain"], "text": "x"}}
    assert layout.fits(leaves_of(later))
    memory = filled(layout, payload(1), later)
    assert_same(loads(memory, "memory"), later)
    assert_same(torch.load(io.BytesIO(memory), weights_only=True), later)
    check_loadable(memory)


def test_a_large_state_which_several_threads_copy_comes_back_bit_for_bit() -> None:
    images = torch.randn(64, 16, 64, 64).to(memory_format=torch.channels_last)  # 16 MB, in an order of its own
    large = torch.nn.Parameter(torch.randn(LARGE_BYTES // 4 + 3))
    state = {"small": torch.arange(7), "large": large, "images": images, "turned": torch.randn(900, 1000).T}
    layout = FileLayout(leaves_of({"model_state": {name: torch.zeros_like(t) for name, t in state.items()}}))
    found = loads(filled(layout, {"model_state": state}), "memory")["model_state"]
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].stride() == tensor.stride(), name


def test_tied_tensors_are_one_in_the_file_and_parts_of_a_buffer_are_not() -> None:
    layout = FileLayout(leaves_of(payload(3)))
    state = loads(filled(layout, payload(3)), "memory")["model_state"]
    assert state["tied.a"].data_ptr() == state["tied.b"].data_ptr()
    assert state["part"].untyped_storage().nbytes() == 6 * 4


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p["raytrain"].update(text="other"),
        lambda p: p["raytrain"].update(best=None),
        lambda p: p["model_state"].update(one=torch.tensor(1.0, dtype=torch.float64)),
        lambda p: p["model_state"].update(part=torch.zeros(7)),
        lambda p: p["model_state"].update({"tied.b": torch.zeros(2, 3)}),
        lambda p: p.update(it=float(p["it"])),
        lambda p: p.update(it=2**40),
        lambda p: p.update(more=1),
    ],
)
def test_a_payload_of_another_shape_needs_another_layout(change: Any) -> None:
    other = payload(3)
    change(other)
    layout = FileLayout(leaves_of(payload(3)))
    assert not layout.fits(leaves_of(other))
    assert_same(loads(filled(FileLayout(leaves_of(other)), other), "memory"), other)


def test_numbers_of_any_size_are_filled_in() -> None:
    def numbers(*values: Any) -> dict[str, Any]:
        return {"model_state": {}, "numbers": list(values)}

    layout = FileLayout(leaves_of(numbers(0, 1, 2, 0.0)))
    for values in ((-(2**31), 2**31 - 1, 255, math.inf), (65536, 0, -1, -0.0), (256, 7, 7, 5e-324)):
        assert layout.fits(leaves_of(numbers(*values)))
        found = loads(filled(layout, numbers(*values)), "memory")["numbers"]
        assert found == list(values) and math.copysign(1, found[3]) == math.copysign(1, values[3])


def test_tensors_hidden_in_other_containers_make_a_payload_odd_and_it_is_saved_as_a_whole() -> None:
    odd = {"model_state": OrderedDict(w=torch.ones(3))}
    with pytest.raises(IrregularPayload):
        FileLayout(leaves_of(odd))
    assert torch.equal(loads(memoryview(dumps(odd)), "memory")["model_state"]["w"], torch.ones(3))


def test_objects_that_loading_would_refuse_are_refused_before_anything_is_trusted() -> None:
    bad = {**payload(1), "mine": np.float64(1)}
    with pytest.raises(CheckpointError, match=r"numpy.*which loading would refuse"):
        check_loadable(filled(FileLayout(leaves_of(bad)), bad))


def test_an_array_among_the_values_is_compared_by_nobody() -> None:
    first, second = ({"model_state": {}, "array": np.arange(3)} for _ in range(2))
    assert not FileLayout(leaves_of(first)).fits(leaves_of(second))


def test_what_changes_in_place_among_the_values_is_noticed() -> None:
    counts = Counter(steps=1)
    state = {"model_state": {"_extra_state": {"counts": counts, "seen": {1}}}}
    layout = FileLayout(leaves_of(state))
    assert layout.fits(leaves_of(state))
    counts["steps"] += 1
    assert not layout.fits(leaves_of(state))
