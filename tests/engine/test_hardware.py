"""What rounds otherwise is told: where ranks differ, and where a run goes on elsewhere."""

from __future__ import annotations

import platform

import pytest
import torch
from processes import Pair

from raytrain.engine import hardware
from raytrain.engine.hardware import cpu_name, hardware_here, hardware_notes, other_hardware
from raytrain.engine.world import World

OLD = {"torch": "2.13.0", "CPU": "Xeon with AVX512 kernels"}


def test_what_rounds_is_torch_and_the_kind_of_processor() -> None:
    here = hardware_here(torch.device("cpu"))
    assert here.keys() == OLD.keys() and here["torch"] == torch.__version__
    assert here["CPU"].startswith(cpu_name()) and here["CPU"].endswith(" kernels")


def test_a_system_without_proc_has_a_name_of_its_processor_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "Path", lambda path: __import__("pathlib").Path("/nowhere"))
    assert cpu_name.__wrapped__() == platform.machine()


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        (OLD, OLD, []),
        ({}, OLD, []),  # an older checkpoint
        (OLD, {**OLD, "torch": "2.14.0"}, ["torch was 2.13.0, now 2.14.0"]),
        (
            OLD,
            {**OLD, "CPU": "EPYC with AVX2 kernels"},
            ["CPU was Xeon with AVX512 kernels, now EPYC with AVX2 kernels"],
        ),
        (OLD, {**OLD, "GPU": "H200"}, []),  # another device is told as such
    ],
)
def test_what_is_not_as_it_was_is_told_when_a_run_goes_on(
    was: dict[str, str], now: dict[str, str], told: list[str]
) -> None:
    assert other_hardware(was, now) == [f"{line}: sums may be rounded otherwise from here on" for line in told]


def noted(rank: int, kinds: list[str]) -> list[str]:
    return hardware_notes(World(rank, 2, 2), {"torch": "2.13.0", "CPU": kinds[rank]})


def test_ranks_that_differ_are_named(pair: Pair) -> None:
    assert pair.run(noted, ["Xeon", "Xeon"]) == [[], []]
    (first,), second = pair.run(noted, ["Xeon", "EPYC"])
    assert [first] == second and first.startswith("workers differ in CPU: Xeon on rank 0; EPYC on rank 1. ")
