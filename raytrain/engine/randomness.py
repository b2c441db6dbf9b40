"""Seeds that are a function of what is drawn for, never of the process that draws."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch

from raytrain.engine.object_graph import values_of, walk

GLOBAL = (np.random.mtrand._rand, random._inst, torch.default_generator)


def keyed_seed(*key: Hashable) -> int:
    """A 64-bit seed that depends on every part of `key` (ints and strings) and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def seed_all(*key: Hashable) -> None:
    """Seed random, numpy's legacy generator and torch (CPU, and every GPU if this process has begun to use them)."""
    seed_globals(keyed_seed(*key))


def seed_globals(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # Not torch.manual_seed: it writes down the call stack for each kind of device that is not in use,
    # 0.4 ms on a two-core machine, where this takes 1 us and a sample of digits 50 us.
    torch.default_generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed & 0x7FFFFFFFFFFFFFFF)


def random_state() -> tuple[Any, ...]:
    """What seed_all sets on the CPU, to compare: equal as long as nothing was drawn."""
    numpys: Any = np.random.get_state()
    kind, words, *rest = numpys
    return random.getstate(), (kind, words.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()


def torch_random_state(device: torch.device) -> list[bytes]:
    """That of torch's global generators which what runs on `device` draws from; on a GPU nobody waits for it."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return [state.numpy().tobytes() for state in states]


class Randomness:
    """All that draws for one purpose: the global generators, and those that its objects own.

    These are found by walking the objects. Each is seeded by its path besides, so that no two give the same numbers;
    the path is the same in every process that has the objects.
    """

    def __init__(self, **roots: Any) -> None:
        self._roots = roots
        self._owned: dict[str, Any] = {}
        self._seed: int | None = None
        self.find()

    def find(self) -> list[str]:
        """Look what the objects own now; the paths where there was no generator when this was last asked."""
        known, self._owned = set(self._owned), {}
        found: set[int] = set()
        for path, value in walk(self._roots, into_code=True, plain=False):
            source = value.bit_generator if isinstance(value, np.random.Generator) else value
            if is_generator(source) and id(source) not in found:
                found.add(id(source))
                self._owned[path if path not in self._owned else f"{path}#{len(found)}"] = source
        return [path for path in self._owned if path not in known]

    def seed(self, *key: Hashable) -> None:
        """Seed all of them, for what is drawn until this is called again."""
        self._seed = seed = keyed_seed(*key)
        seed_globals(seed)
        for path, source in self._owned.items():
            reseed(source, keyed_seed(seed, path))

    def is_reseeded(self) -> bool:
        """Whether somebody else has seeded torch since `seed`."""
        return self._seed is not None and torch.initial_seed() != self._seed & 0x7FFFFFFFFFFFFFFF

    def state(self) -> tuple[Any, ...]:
        """What `seed` sets, to compare: equal as long as nothing was drawn."""
        return random_state(), values_of({path: state_of(source) for path, source in self._owned.items()})


def is_generator(value: Any) -> bool:
    """Whether it is a generator of numbers that can be seeded, and none of those that all share."""
    kinds = (np.random.BitGenerator, np.random.RandomState, random.Random, torch.Generator)
    if not isinstance(value, kinds) or isinstance(value, random.SystemRandom):
        return False
    return all(value is not shared for shared in GLOBAL)


def reseed(source: Any, seed: int) -> None:
    if isinstance(source, torch.Generator):
        source.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    elif isinstance(source, random.Random):
        source.seed(seed)
    elif isinstance(source, np.random.RandomState):  # both ways forget a Gaussian number that it has in store
        bits = source._bit_generator
        if isinstance(bits, np.random.MT19937):
            source.seed(seed & 0xFFFFFFFF)  # 1.4 us; by set_state 266
        else:
            source.set_state(dict(type(bits)(seed).state))
    else:
        source.state = type(source)(seed).state


def state_of(source: Any) -> Any:
    if isinstance(source, torch.Generator):
        return source.get_state()
    if isinstance(source, random.Random):
        return source.getstate()
    return source.get_state(legacy=False) if isinstance(source, np.random.RandomState) else source.state
