"""Rank 0's weights on every process, after a look at what each process has built by itself."""

from __future__ import annotations

import hashlib
import zlib

import torch

from raytrain.batch import is_plain
from raytrain.engine.world import World
from raytrain.errors import TaskError, listed

# Of a parameter or buffer: what it is, in words, and a hash of its values.
Facts = tuple[str, int]


def take_from_rank_0(model: torch.nn.Module, world: World) -> list[str]:
    """Collective. Every process has rank 0's parameters and buffers; returns a line where some had others.

    TaskError, on every rank, where it is another model: other names, another order, shapes, types, or other parameters
    that are trained.
    """
    if world.size == 1:
        return []
    tensors = tensors_of(model)
    facts = {name: (described(tensor), digest(tensor)) for name, tensor in tensors.items()}
    # Of all tensors in one, since models have thousands.
    total = hashlib.blake2b(repr(list(facts.items())).encode(), digest_size=16).digest()
    if len(set(world.all_objects(total))) == 1:
        return []
    of_ranks = world.all_objects(facts)
    first = of_ranks[0]
    check_same_model(of_ranks)
    differing = {rank: [n for n in first if other[n] != first[n]] for rank, other in enumerate(of_ranks)}
    names = [name for name in first if any(name in each for each in differing.values())]
    values = world.broadcast_object({name: tensors[name].detach().cpu() for name in names} if world.is_first else None)
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)
    ranks = [rank for rank, each in differing.items() if each]
    return [
        f"build_model gave other values on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} than on rank 0, "
        f"whose are taken: {listed(names)}. Likely a generator without a seed, the clock, or an order that is another "
        "in each process (a set, os.listdir)"
    ]


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, each once; without those that are several tensors (sparse ones)."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if is_plain(tensor)}


def described(tensor: torch.Tensor) -> str:
    """What has to be the same on every process for the gradients to be those of one model."""
    kind = "a buffer" if not isinstance(tensor, torch.nn.Parameter) else "trained" if tensor.requires_grad else "frozen"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}, {kind}"


def digest(tensor: torch.Tensor) -> int:
    """Of its values, bit by bit: at 4 GB/s, where sha256 has 1.7; one of 4e9 differences is not seen."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(values.numpy().data)


def check_same_model(of_ranks: list[dict[str, Facts]]) -> None:
    """TaskError that names what is not on every rank as it is on rank 0."""
    first = of_ranks[0]
    for rank, other in enumerate(of_ranks):
        wrong = [f"{name} is only on rank 0" for name in first if name not in other]
        wrong += [f"{name} is not on rank 0" for name in other if name not in first]
        wrong += [
            f"{name} is {other[name][0]} (rank 0: {first[name][0]})"
            for name in first
            if name in other and other[name][0] != first[name][0]
        ]
        if not wrong and list(other) != list(first):
            name, here = next((a, b) for a, b in zip(first, other, strict=True) if a != b)
            wrong = [f"{here} comes where rank 0 has {name}"]
        if wrong:
            raise TaskError(
                f"build_model gave another model on rank {rank} than on rank 0: {listed(wrong, comma='; ')}. What it "
                "is made of (class names, a vocabulary, files that are found) is not the same in each process: sort "
                "it, or read it from the config"
            )
