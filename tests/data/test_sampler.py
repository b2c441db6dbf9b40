"""Which samples each virtual worker takes: what torch's DistributedSampler gives, from any cursor on."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.data import BatchSampler, DistributedSampler

from raytrain.data.sampler import dealt_order, epoch_order, step_samples
from raytrain.progress import Plan


def plan_of(num_samples: int, virtual_workers: int, batch_size: int = 4, accumulate: int = 1) -> Plan:
    return Plan(num_samples, batch_size, virtual_workers, accumulate, num_epochs=1)


def torchs(num_samples: int, virtual_workers: int, rank: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    sampler = DistributedSampler(range(num_samples), virtual_workers, rank, shuffle=shuffle, seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("virtual_workers", [1, 2, 3, 8])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 7, 8, 9, 64, 101])
def test_virtual_worker_v_takes_what_rank_v_of_a_distributed_sampler_takes(
    num_samples: int, virtual_workers: int, shuffle: bool
) -> None:
    for seed, epoch in [(0, 0), (0, 1), (0, 79), (666, 0), (2**32 - 1, 5)]:
        order = epoch_order(num_samples, seed, epoch, shuffle)
        steps = torch.cat(list(step_samples(order, 0, plan_of(num_samples, virtual_workers))), dim=1)
        expected = [torchs(num_samples, virtual_workers, v, seed, epoch, shuffle) for v in range(virtual_workers)]
        assert steps.tolist() == expected


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 1), (4, 1), (4, 3), (3, 2), (50, 1)])
def test_a_micro_batch_is_the_batch_of_a_data_loader(batch_size: int, accumulate: int) -> None:
    plan = plan_of(37, 2, batch_size, accumulate)
    for v in range(2):
        sampler = DistributedSampler(range(37), 2, v, shuffle=True, seed=3)
        expected = list(BatchSampler(sampler, batch_size, drop_last=False))
        found = [
            part.tolist()
            for shares in step_samples(epoch_order(37, 3, 0, True), 0, plan)
            for part in shares[v].split(batch_size)
        ]
        assert found == expected


@pytest.mark.parametrize("virtual_workers", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [5, 40, 41])
def test_what_was_consumed_is_the_beginning_of_one_global_order(num_samples: int, virtual_workers: int) -> None:
    order = epoch_order(num_samples, 1, 2, True)
    consumed: list[int] = []
    plan = plan_of(num_samples, virtual_workers)
    for shares in step_samples(order, 0, plan):
        consumed += shares.flatten().tolist()
        first = dealt_order(order, 0, plan)[: len(consumed)]
        assert Counter(consumed) == Counter(first.tolist())


@pytest.mark.parametrize("new", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("old", [1, 2, 4, 5])
@pytest.mark.parametrize("num_samples", [41, 64])
def test_the_rest_of_an_epoch_dealt_to_another_number_uses_each_sample_once(
    num_samples: int, old: int, new: int
) -> None:
    order = epoch_order(num_samples, 0, 0, True)
    steps = list(step_samples(order, 0, plan_of(num_samples, old)))
    for done in range(len(steps)):
        consumed = [i for shares in steps[:done] for i in shares.flatten().tolist()]
        rest = torch.cat(list(step_samples(order, len(consumed), plan_of(num_samples, new, 3))), dim=1)
        dealt = rest.t().flatten().tolist()  # in the order of dealing; what is padded comes last
        left = num_samples - len(consumed)
        assert sorted(consumed + dealt[:left]) == list(range(num_samples))
        assert len(dealt) - left < new


def test_going_on_from_a_cursor_takes_the_very_steps_that_were_left() -> None:
    order, plan = epoch_order(101, 4, 9, True), plan_of(101, 3, 5, 2)
    steps = [shares.tolist() for shares in step_samples(order, 0, plan)]
    for done in range(len(steps)):
        assert [s.tolist() for s in step_samples(order, done * plan.samples_per_step, plan)] == steps[done:]


def test_each_epoch_has_its_own_order_and_a_seed_is_an_epoch_of_seed_0_as_in_torch() -> None:
    orders = [tuple(epoch_order(50, 0, epoch, True).tolist()) for epoch in range(10)]
    assert len(set(orders)) == 10
    assert tuple(epoch_order(50, 3, 4, True).tolist()) == orders[7]


def test_more_virtual_workers_than_samples_repeat_them_as_in_torch() -> None:
    assert dealt_order(torch.tensor([1, 0]), 0, plan_of(2, 5)).tolist() == [1, 0, 1, 0, 1]


# LOADER.LAST


def cut_as(last: str, num_samples: int, virtual_workers: int, accumulate: int, cursor: int = 0) -> list[torch.Tensor]:
    plan = Plan(num_samples, 4, virtual_workers, accumulate, 1, last)
    steps = list(step_samples(epoch_order(num_samples, 3, 1, True), cursor, plan))
    assert sum(shares.numel() for shares in steps) == plan.taken(cursor)
    return steps


SIZES = pytest.mark.parametrize(
    ("num_samples", "virtual_workers", "accumulate"),
    [(65, 1, 1), (65, 1, 4), (64, 2, 1), (33, 3, 2), (3, 1, 1), (3, 2, 2), (100, 8, 1)],
)


@SIZES
def test_drop_leaves_out_what_is_no_whole_batch_of_each_virtual_worker_as_in_torch(
    num_samples: int, virtual_workers: int, accumulate: int
) -> None:
    steps = cut_as("drop", num_samples, virtual_workers, accumulate)
    taken = [i for shares in steps for i in shares.t().flatten().tolist()]
    whole = num_samples // (4 * virtual_workers) * 4 * virtual_workers
    assert taken == epoch_order(num_samples, 3, 1, True)[:whole].tolist()
    for v in range(virtual_workers):
        sampler = DistributedSampler(range(num_samples), virtual_workers, v, seed=3, drop_last=True)
        sampler.set_epoch(1)
        expected = [i for batch in BatchSampler(sampler, 4, drop_last=True) for i in batch]
        assert [i for shares in steps for i in shares[v].tolist()] == expected


@SIZES
def test_pad_fills_the_last_batch_with_the_first_samples(
    num_samples: int, virtual_workers: int, accumulate: int
) -> None:
    order = epoch_order(num_samples, 3, 1, True).tolist()
    steps = cut_as("pad", num_samples, virtual_workers, accumulate)
    assert all(shares.shape[1] % 4 == 0 for shares in steps)
    taken = [i for shares in steps for i in shares.t().flatten().tolist()]
    assert taken == [order[i % num_samples] for i in range(len(taken))]
    assert 0 <= len(taken) - num_samples < 4 * virtual_workers


@pytest.mark.parametrize("last", ["keep", "drop", "pad"])
@SIZES
def test_going_on_takes_the_steps_that_were_left_whatever_the_last_batch_is(
    num_samples: int, virtual_workers: int, accumulate: int, last: str
) -> None:
    steps = cut_as(last, num_samples, virtual_workers, accumulate)
    cursor = 0
    for done, shares in enumerate(steps):
        rest = cut_as(last, num_samples, virtual_workers, accumulate, cursor)
        assert [s.tolist() for s in rest] == [s.tolist() for s in steps[done:]]
        cursor += shares.numel()
