"""How many workers an elastic run has, and where: by the room there is, and by what more of them would gain."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from raytrain.cluster.resources import free_workers
from raytrain.cluster.seats import Seat, Seats, is_worth_it, packed

CPU = {"CPU": 1.0}


@pytest.mark.parametrize(
    ("room", "count", "nodes"),
    [
        ({"a": 2, "b": 4, "c": 1}, 5, ["b", "b", "b", "b", "a"]),
        ({"a": 2, "b": 2}, 9, ["a", "a", "b", "b"]),
        ({"a": 0, "b": 0}, 3, []),
        ({"a": 2}, 0, []),
        ({"a": 2}, -1, []),
    ],
)
def test_workers_fill_the_nodes_with_most_room_first(room: dict[str, int], count: int, nodes: list[str]) -> None:
    assert packed(room, count) == nodes


@pytest.mark.parametrize(
    ("virtual", "before", "after", "is_worth"),
    [
        (8, 2, 3, True),  # 4 each -> 3, 3, 2
        (8, 4, 7, False),  # 2 each -> 2, 1, 1, 1, 1, 1, 1: a step is no faster
        (8, 4, 8, True),
        (8, 5, 6, False),
        (7, 3, 4, True),  # 3, 2, 2 -> 2, 2, 2, 1
        (4, 4, 4, False),
        (4, 2, 1, False),
    ],
)
def test_a_run_grows_only_where_the_largest_share_becomes_smaller(
    virtual: int, before: int, after: int, is_worth: bool
) -> None:
    assert is_worth_it(virtual, before, after) == is_worth


@pytest.fixture
def make_seats(ray_address: str) -> Iterator[Any]:
    """Makes seats on a cluster of 8 CPUs, which are given up in the end."""
    with contextlib.ExitStack() as stack:

        def made(least: int, most: int) -> Seats:
            seats = Seats(CPU, least, most, num_virtual=most)
            stack.callback(seats.release)
            return seats

        yield made


@pytest.mark.ray
def test_a_run_takes_what_there_is_room_for_between_its_bounds(make_seats: Any) -> None:
    wait_for_room(8)
    others, seats, waiting = make_seats(1, 5), make_seats(2, 4), make_seats(1, 2)
    assert others.take() and len(others.taken) == 5
    wait_for_room(3)
    assert seats.take() and len(seats.taken) == 3, "fewer than the most, and more than the least"
    wait_for_room(0)
    assert not waiting.take() and not waiting.taken
    assert seats.take() and len(seats.taken) == 3, "they stay its own"
    others.release()
    wait_for_room(5)
    assert seats.take() and len(seats.taken) == 4
    assert waiting.take()


@pytest.mark.ray
def test_a_run_grows_by_processes_that_have_said_that_they_can_train(make_seats: Any) -> None:
    wait_for_room(8)
    others, seats = make_seats(1, 6), make_seats(1, 4)
    assert not seats.grow(1, yes), "before it has workers"
    others.take()
    wait_for_room(2)
    assert seats.take() and len(seats.taken) == 2
    seats.occupy(seats.taken, process_in)
    assert not seats.grow(2, yes) and len(seats.taken) == 2, "there is no room"
    others.release()
    wait_for_room(6)
    assert not seats.grow(2, no) and len(seats.taken) == 2
    assert [note.partition(" has ")[2] for note in seats.notes] == ["room, but does not see the run folder"]
    wait_for_room(6)
    seats._unfit.clear()
    assert seats.grow(2, yes) and len(seats.taken) == 4
    assert all(seat.actor is not None for seat in seats.taken[2:])


def wait_for_room(num_workers: int) -> None:
    """Ray's view of what is free is late by a tenth of a second."""
    from commands import wait_for

    wait_for(lambda: free_workers(CPU) == num_workers, f"room for {num_workers}")


def process_in(seat: Seat) -> Any:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(seat.group, placement_group_bundle_index=0)
    kind: Any = ray.remote(num_cpus=1)(Process)
    return kind.options(scheduling_strategy=strategy).remote()


class Process:
    def execute(self, function: Any) -> Any:
        return function()


def yes() -> bool:
    return True


def no() -> bool:
    return False
