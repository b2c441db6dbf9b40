"""Seeds are a function of their key alone."""

from __future__ import annotations

import random
import timeit

import numpy as np
import torch

from raytrain.engine.randomness import keyed_seed, seed_all


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_seed_is_the_same_in_every_process_and_version() -> None:
    # Python's own hash of a text differs by process; these numbers may never change, or no run can be repeated.
    assert keyed_seed(0) == 5263075011782779848
    assert keyed_seed(7, "sample", "train", 3, 41) == 15402896778999014648


def test_every_part_of_the_key_counts() -> None:
    keys = [(0,), (1,), ("0",), (0, 0), (0, "a"), ("a", 0), (1, 23), (12, 3), ("1", "23"), ("12", "3"), ("1, 23",)]
    assert len({keyed_seed(*key) for key in keys}) == len(keys)
    many = {keyed_seed(0, "sample", "train", epoch, sample) for epoch in range(20) for sample in range(500)}
    assert len(many) == 20 * 500


def test_what_is_drawn_depends_on_the_key_and_not_on_what_was_drawn_before() -> None:
    seed_all(5, "step", 1)
    first = draws()
    assert draws() != first
    seed_all(5, "step", 2)
    assert all(a != b for a, b in zip(draws(), first, strict=True))
    seed_all(5, "step", 1)
    assert draws() == first


def test_torch_draws_what_its_own_manual_seed_gives() -> None:
    seed_all(3, "x")
    drawn = torch.rand(5)
    torch.manual_seed(keyed_seed(3, "x") & 0x7FFFFFFFFFFFFFFF)
    assert torch.equal(drawn, torch.rand(5))


def test_seeding_is_cheap_enough_to_be_done_for_every_sample() -> None:
    """torch.manual_seed takes 0.4 ms, mostly to write down the call stack for devices that are not there."""
    best_s = min(timeit.repeat(lambda: seed_all(0, "sample", "train", 0, 1), number=50, repeat=20)) / 50
    assert best_s < 1e-4
