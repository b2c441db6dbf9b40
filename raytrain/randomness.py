"""Seeds that are a function of what is drawn for, never of the process that draws."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Hashable

import numpy as np
import torch


def keyed_seed(*key: Hashable) -> int:
    """A 64-bit seed that depends on every part of `key` (ints and strings) and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def seed_all(*key: Hashable) -> None:
    """Seed random, numpy's legacy generator and torch (CPU and every GPU) by `key`."""
    seed = keyed_seed(*key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
