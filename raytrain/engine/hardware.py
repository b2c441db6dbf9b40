"""What rounds: the release of torch and the kind of processor, whose kernels may add in another order than others'."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from raytrain.engine.world import World


def hardware_here(device: torch.device) -> dict[str, str]:
    """By what it is: of this process."""
    kernels = f"{cpu_name()} with {torch.backends.cpu.get_cpu_capability()} kernels"
    found = {"torch": torch.__version__, "CPU": kernels}
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
    return found


@functools.cache
def cpu_name() -> str:
    """As the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def hardware_notes(world: World, here: Mapping[str, str]) -> list[str]:
    """Collective. A line for each thing that is not alike on all ranks."""
    everyone = world.all_objects(dict(here))
    notes = []
    for name in here:
        found = [each.get(name, "none") for each in everyone]
        if len(set(found)) > 1:
            ranks = "; ".join(
                f"{kind} on rank {', '.join(str(r) for r, other in enumerate(found) if other == kind)}"
                for kind in dict.fromkeys(found)
            )
            notes.append(
                f"workers differ in {name}: {ranks}. What each computes may be rounded otherwise, so the bits depend "
                "on which of them hosts which virtual worker"
            )
    return notes


def other_hardware(was: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A line for each thing that is not as it was when a checkpoint was made."""
    return [
        f"{name} was {was[name]}, now {kind}: sums may be rounded otherwise from here on"
        for name, kind in now.items()
        if was.get(name, kind) != kind
    ]
