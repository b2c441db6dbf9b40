"""One order of addition, whoever adds: checked as text, on which no rounding depends, and as numbers."""

from __future__ import annotations

import pytest
import torch

from raytrain.engine.tree import CHUNK, Schedule, add_up, additions, block, merged, of_processes, schedule, siblings


def formula(leaves: int, processes: int) -> str:
    """The sum of v0, v1, ... as the processes add it up, with brackets."""
    nodes = []
    for rank in range(processes):
        of_rank = [f"v{v}" for v in block(rank, processes, leaves)]
        nodes += written(of_rank, additions(rank, processes, leaves).here.arrivals)
    (whole,) = written(nodes, additions(0, processes, leaves).across.arrivals)
    return whole


def written(parts, arrivals) -> list[str]:  # type: ignore[no-untyped-def]
    stack: list[str] = []
    for part, arrival in zip(parts, arrivals, strict=True):
        stack.append(part)
        for _ in range(arrival.adds + arrival.merges):
            top = stack.pop()
            stack[-1] = f"({stack[-1]} + {top})"
        assert arrival.place == len(stack) - 1 + arrival.merges
    return stack


@pytest.mark.parametrize("leaves", range(1, 34))
def test_every_number_of_processes_adds_by_the_same_formula(leaves: int) -> None:
    expected = formula(leaves, 1)
    assert all(expected.count(f"v{v}") >= 1 for v in range(leaves))
    for processes in range(2, leaves + 1):
        assert formula(leaves, processes) == expected


def test_the_tree_has_the_largest_power_of_two_on_its_left() -> None:
    assert formula(3, 1) == "((v0 + v1) + v2)"
    assert formula(4, 3) == "((v0 + v1) + (v2 + v3))"
    assert formula(7, 2) == "(((v0 + v1) + (v2 + v3)) + ((v4 + v5) + v6))"
    assert siblings(3) == {(0, 1, 2), (0, 2, 3)} and siblings(1) == set()


def test_blocks_are_neighbours_and_differ_by_one_at_most() -> None:
    assert [list(block(rank, 3, 8)) for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    for leaves in range(1, 20):
        for processes in range(1, leaves + 1):
            blocks = [block(rank, processes, leaves) for rank in range(processes)]
            assert [v for each in blocks for v in each] == list(range(leaves))
            assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


def test_a_process_needs_few_buffers_and_hands_over_few_nodes() -> None:
    for leaves in (1, 2, 4, 8, 64, 1024):
        alone = additions(0, 1, leaves).here
        assert alone.nodes == ((0, leaves),) and depth(alone) == max(1, leaves.bit_length() - 1)
        each = additions(leaves - 1, leaves, leaves)
        assert depth(each.here) == 1 and each.counts == (1,) * leaves
    for leaves in range(2, 65):
        for processes in range(2, leaves):
            adds = additions(processes // 2, processes, leaves)
            most = max(len(block(0, processes, leaves)), 2).bit_length()
            assert max(adds.counts) <= 2 * most and depth(adds.here) <= 2 * most


def depth(made: Schedule) -> int:
    """Buffers that are needed on the way."""
    return 1 + max(arrival.place for arrival in made.arrivals)


def test_where_sums_need_not_be_exact_each_process_is_a_leaf() -> None:
    adds = of_processes(0, 3)
    assert adds.counts == (1, 1, 1)
    assert written(["p0", "p1", "p2"], adds.across.arrivals) == ["((p0 + p1) + p2)"]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("size", [1, 100, CHUNK, 2 * CHUNK + 7])
def test_large_parts_add_up_to_the_bits_of_small_ones(count: int, size: int) -> None:
    generator = torch.Generator().manual_seed(count)
    parts = [torch.randn(size, generator=generator) * 10.0 ** (i % 5) for i in range(count)]
    before = [part.clone() for part in parts]
    arrivals = schedule([(i, i + 1) for i in range(count)], count).arrivals
    (expected,) = merged(parts, arrivals)
    found = torch.full((size,), torch.nan)
    add_up(parts, arrivals, found)
    assert torch.equal(found, expected)
    assert all(torch.equal(part, was) for part, was in zip(parts, before, strict=True))
