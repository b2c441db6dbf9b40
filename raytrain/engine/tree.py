"""The one order in which the parts of a sum are added, whoever adds them.

Rounding makes a sum depend on the order of its additions. So the virtual workers of a run are the leaves of one fixed
binary tree, and each sum over them is that tree's: a node's sum is its left child's plus its right child's. A process
hosts neighbouring leaves and merges what it can, as a binary counter does; the few nodes that are left of all
processes are merged by the same rule. Which process adds what thus changes nothing.

The tree of n leaves has the largest power of two below n on its left, and the rest on its right: the aligned blocks
of 2, 4, 8 ... leaves are its nodes, so blocks of any processes cut it into few pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

CHUNK = 2**15  # elements that are added at a time: some of these chunks fit into a core's own cache

Node = tuple[int, int]  # its leaves: from, up to


class Arrival(NamedTuple):
    """What becomes of one part of a sum when it arrives, on a stack of buffers.

    place:  the buffer it is put into, or added to
    adds:   whether it is added to what lies there, which is its sibling, instead of put
    merges: how many buffers are then added, from the top, each to the one below
    """

    place: int
    adds: bool
    merges: int


class Schedule(NamedTuple):
    """How neighbouring parts are added in the tree's order.

    leaves:   of the whole tree
    arrivals: one a part, in order
    nodes:    what is left at the end, in buffers 0, 1, ...: no two of them are siblings
    """

    leaves: int
    arrivals: tuple[Arrival, ...]
    nodes: tuple[Node, ...]


class Stack:
    """What has arrived of a sum over the tree of so many leaves, merged as far as it can be, from left to right."""

    def __init__(self, leaves: int) -> None:
        self._siblings = siblings(leaves)
        self.nodes: list[Node] = []

    def clear(self) -> None:
        self.nodes.clear()

    def joins(self, node: Node, stop: int) -> bool:
        """Whether what comes behind `node`, up to leaf `stop`, is its sibling."""
        return (*node, stop) in self._siblings

    def push(self, node: Node) -> Arrival:
        """The next part has arrived."""
        nodes = self.nodes
        adds = bool(nodes) and self.joins(nodes[-1], node[1])
        place, merges = len(nodes) - adds, 0
        nodes[place:] = [(nodes[-1][0], node[1])] if adds else [node]
        while len(nodes) > 1 and self.joins(nodes[-2], nodes[-1][1]):
            nodes[-2:] = [(nodes[-2][0], nodes[-1][1])]
            merges += 1
        return Arrival(place, adds, merges)


def siblings(leaves: int) -> set[tuple[int, int, int]]:
    """(start, middle, stop) of each pair of siblings in the tree of so many leaves."""
    found, open_nodes = set(), [(0, leaves)]
    while open_nodes:
        start, stop = open_nodes.pop()
        if stop - start > 1:
            middle = start + (1 << (stop - start - 1).bit_length() - 1)
            found.add((start, middle, stop))
            open_nodes += [(start, middle), (middle, stop)]
    return found


def schedule(parts: Sequence[Node], leaves: int) -> Schedule:
    """How `parts`, neighbouring nodes of the tree of so many leaves, are merged as far as they can be."""
    stack = Stack(leaves)
    arrivals = tuple(stack.push(part) for part in parts)
    return Schedule(leaves, arrivals, tuple(stack.nodes))


def block(rank: int, processes: int, leaves: int) -> range:
    """The leaves that a process hosts: neighbours, as many as the others', one more on the first few."""
    each, more = divmod(leaves, processes)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


class Additions(NamedTuple):
    """Which additions a process makes of a sum over all virtual workers.

    here:   of its own leaves
    across: of the nodes that are left of all processes, in the order of ranks
    counts: how many these are, by rank
    """

    here: Schedule
    across: Schedule
    counts: tuple[int, ...]


def additions(rank: int, processes: int, leaves: int) -> Additions:
    """For process `rank` of so many."""
    schedules = [schedule([(v, v + 1) for v in block(r, processes, leaves)], leaves) for r in range(processes)]
    nodes = [node for each in schedules for node in each.nodes]
    return Additions(schedules[rank], schedule(nodes, leaves), tuple(len(each.nodes) for each in schedules))


def of_processes(rank: int, processes: int) -> Additions:
    """Where each process has one node, whatever it hosts: its leaf of a tree of the processes."""
    leaves = [(r, r + 1) for r in range(processes)]
    return Additions(schedule([leaves[rank]], processes), schedule(leaves, processes), (1,) * processes)


def merged(parts: Sequence[torch.Tensor], arrivals: Sequence[Arrival]) -> list[torch.Tensor]:
    """What is left of small `parts` once they are added as `arrivals` say."""
    stack: list[torch.Tensor] = []
    for part, arrival in zip(parts, arrivals, strict=True):
        stack.append(part)
        for _ in range(arrival.adds + arrival.merges):
            top = stack.pop()
            stack[-1] = stack[-1] + top
    return stack


def add_up(parts: Sequence[torch.Tensor], arrivals: Sequence[Arrival], out: torch.Tensor) -> None:
    """`out` becomes the one sum that is left of large `parts`; these stay as they are.

    In chunks, so that what lies between the first addition and the last stays in the cache.
    """
    if len(parts) == 1:
        out.copy_(parts[0])
    elif len(parts) == 2:
        torch.add(parts[0], parts[1], out=out)
    else:
        size = CHUNK if out.device.type == "cpu" else len(out)
        spare = [out.new_empty(min(size, len(out))) for _ in range(1 + max(arrival.place for arrival in arrivals))]
        for start in range(0, len(out), size):
            chunk = slice(start, start + size)
            buffers = [out[chunk], *(each[: len(out[chunk])] for each in spare[1:])]
            _add_chunk([part[chunk] for part in parts], arrivals, buffers)


def _add_chunk(parts: Sequence[torch.Tensor], arrivals: Sequence[Arrival], buffers: Sequence[torch.Tensor]) -> None:
    """The sum of `parts` into the first of `buffers`; a part is read where it lies until something is added to it."""
    stack: list[torch.Tensor] = []
    for part, arrival in zip(parts, arrivals, strict=True):
        stack.append(part)
        for _ in range(arrival.adds + arrival.merges):
            top, place = stack.pop(), len(stack) - 1
            stack[place] = torch.add(stack[place], top, out=buffers[place])
