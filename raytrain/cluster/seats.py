"""The places that an elastic run has on a cluster: one for each worker, kept while workers come and go.

A seat is a placement group of one bundle, on a node chosen here. So the workers on one node can be given up without
those on another, what the run has stays its own while workers are started again, and a place to grow into is had, with
a process that stands ready in it, before a step is held up for it. A trial of a sweep has the fewest that it needs in a
placement group that Ray Tune has made for it, all at once, and what it has beyond them in groups of one, as its share
of the cluster allows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray._private.state import state as cluster_state
from ray.core.generated import gcs_pb2
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from raytrain.cluster.resources import count_fitting, node_address

NODE_ID = "ray.io/node-id"  # the label by which Ray knows a node
PLACE_S = 5  # what a node says to have room for is placed by then, or somebody else has it; Ray counts whole seconds
ANSWER_S = 1.0  # a node whose raylet takes no connection by then is gone; Ray itself says so after 15 s and more
READY_S = 120.0  # so long a process may take to start and to import what a run needs
DIALS = 32  # nodes that are asked at a time
FREED_S, FREED_LOOK_S = 1.0, 0.1  # so late Ray may tell that what another trial had is free, and how often it is asked


@dataclasses.dataclass(eq=False)
class Seat:
    """Room for one worker: a bundle of a placement group. actor: the process that is there, if one is.

    is_reserved: whether the group is not the run's to remove
    """

    node: str
    group: Any
    actor: Any = None
    bundle: int = 0
    is_reserved: bool = False

    def vacate(self) -> None:
        """The process ends, and the room stays."""
        if self.actor is not None:
            with contextlib.suppress(RayError):  # its node is gone, and it with that
                ray.kill(self.actor)
        self.actor = None

    def give_up(self) -> None:
        self.vacate()
        if not self.is_reserved:
            with contextlib.suppress(RayError):
                remove_placement_group(self.group)


class Seats:
    """Those of one launch: `least` at least for it to train, and `most` at most.

    per_worker:   what each reserves
    num_virtual:  virtual workers, which are dealt out to them
    reserved:     a placement group of `least` bundles that the run has for life, as the trial of a sweep
    share:        how many such a trial may have now
    can_keep:     whether processes that have trained may train again; none that failed to
    notes:        what a user should know, to be taken out
    """

    def __init__(
        self,
        per_worker: Mapping[str, float],
        least: int,
        most: int,
        num_virtual: int,
        reserved: Any = None,
        share: Callable[[], int] | None = None,
    ) -> None:
        self.per_worker = dict(per_worker)
        self._reserved, self._share = reserved, share
        self.least, self.most, self.num_virtual = least, most, num_virtual
        self.taken: list[Seat] = []
        self.can_keep, self.notes = True, list[str]()
        self._fit, self._unfit = set[str](), set[str]()  # nodes that were looked at; at the start all are
        self._lock = threading.RLock()  # the controller's thread takes, one of the driver's grows
        self._coming: list[Seat] = []
        self._start: Callable[[Seat], Any] | None = None
        self._is_over = False

    @property
    def limit(self) -> int:
        """How many workers the run may have now, if there is room for them."""
        return self.most if self._share is None else max(self.least, min(self.most, self._share()))

    def take(self) -> bool:
        """Give up what is on nodes that go, or too much, and take what there is room for; whether the run can train.

        On nodes that have come since the start only where the others are too few: `grow` looks at them first.
        """
        with self._lock:
            limit, give_up = self.limit, time.monotonic() + FREED_S
            self._take(limit)
            while self._share is not None and len(self.taken) < limit and time.monotonic() < give_up:
                time.sleep(FREED_LOOK_S)
                self._take(limit)
            return len(self.taken) >= self.least

    def _take(self, limit: int) -> None:
        nodes = present_nodes()
        self._fit = self._fit or set(nodes)
        for seat in [seat for seat in self.taken if seat.node not in nodes]:
            self.taken.remove(seat)
            seat.give_up()
        self.taken = [*self._newly_reserved(nodes), *self.taken]
        while len(self.taken) > limit:
            self.taken.pop().give_up()
        self.taken += self._placed(nodes & self._fit, limit - len(self.taken))
        if len(self.taken) < self.least:
            self.taken += self._placed(nodes - self._fit - self._unfit, limit - len(self.taken))

    def _newly_reserved(self, nodes: Set[str]) -> list[Seat]:
        """Those in the group that is the run's for life, but for those that are taken already: Ray moves a bundle whose
        node has died."""
        if self._reserved is None:
            return []
        places: dict[int, str] = placement_group_table(self._reserved)["bundles_to_node_id"]
        known = {seat.bundle for seat in self.taken if seat.is_reserved}
        return [
            Seat(node, self._reserved, bundle=bundle, is_reserved=True)
            for bundle, node in places.items()
            if bundle not in known and node in nodes
        ]

    def occupy(self, seats: Iterable[Seat], start: Callable[[Seat], Any]) -> list[Any]:
        """The processes of these seats, started by `start` where there is none yet."""
        self._start = start
        for seat in seats:
            seat.actor = seat.actor or start(seat)
        return [seat.actor for seat in seats]

    def grow(self, num_workers: int, is_fit: Callable[[], bool]) -> bool:
        """Whether there are seats for more than `num_workers`, with processes that stand ready; takes seconds.

        Only for so many that the largest share of virtual workers becomes smaller: else no step would be faster.
        is_fit: is asked in each of those processes, which has imported all that a run needs then
        """
        with self._lock:
            if self._start is None or self._is_over:
                return False
            nodes, limit = present_nodes() - self._unfit, self.limit
            room = sum(self._room(nodes).values()) + len(self.taken)
            if not is_worth_it(self.num_virtual, num_workers, min(room, limit)):
                return False
            coming = self._coming = self._placed(nodes, limit - len(self.taken))
            for seat in coming:
                seat.actor = self._start(seat)
        answers: list[bool | None] = [None] * len(coming)
        with contextlib.suppress(RayError):  # one has died, or all is over
            answers = ray.get([seat.actor.execute.remote(is_fit) for seat in coming], timeout=READY_S)
        with self._lock:
            for seat, is_ready in zip(coming, answers, strict=True):
                if is_ready and not self._is_over:
                    self.taken.append(seat)
                    self._fit.add(seat.node)
                    continue
                seat.give_up()
                if is_ready is False and seat.node not in self._unfit:
                    self._unfit.add(seat.node)
                    self.notes.append(f"node {node_address(seat.node)} has room, but does not see the run folder")
            self._coming = []
            return is_worth_it(self.num_virtual, num_workers, len(self.taken))

    def release(self) -> None:
        """The run is over: nothing is left of it on the cluster."""
        with self._lock:
            self._is_over = True
            for seat in [*self.taken, *self._coming]:
                seat.give_up()
            self.taken, self._coming = [], []

    def _room(self, nodes: Set[str]) -> dict[str, int]:
        """How many workers more each of these nodes could hold now."""
        free = available_resources_per_node()
        return {node: count_fitting(free[node], self.per_worker) for node in nodes if node in free}

    def _placed(self, nodes: Set[str], count: int) -> list[Seat]:
        """Up to `count` seats more on these nodes."""
        seats = [Seat(node, self._group_on(node)) for node in packed(self._room(nodes), count)]
        give_up, placed = time.monotonic() + PLACE_S, []
        for seat in seats:
            while not (is_placed := seat.group.wait(1)) and time.monotonic() < give_up:
                pass
            if is_placed:
                placed.append(seat)
            else:  # somebody else was quicker
                seat.give_up()
        return placed

    def _group_on(self, node: str) -> Any:
        return placement_group([self.per_worker], bundle_label_selector=[{NODE_ID: node}])


def packed(room: Mapping[str, int], count: int) -> list[str]:
    """The nodes for up to `count` workers: those with most room first, so that few nodes have to talk."""
    places = [node for node in sorted(room, key=lambda node: (-room[node], node)) for _ in range(room[node])]
    return places[: max(0, count)]


def is_worth_it(num_virtual: int, before: int, after: int) -> bool:
    """Whether `after` workers have smaller shares than `before`: by the largest one, for which the others wait."""
    return after > before and -(-num_virtual // after) < -(-num_virtual // before)


def worthwhile_sizes(least: int, most: int, num_virtual: int) -> list[int]:
    """The numbers of workers from `least` on that each make a step faster than the one before."""
    return [least, *(size for size in range(least + 1, most + 1) if is_worth_it(num_virtual, size - 1, size))]


def room_for_all(per_worker: Mapping[str, float]) -> int:
    """How many workers the trials of this sweep could have, all together: of what is free, and of what they have."""
    room, job = available_resources_per_node(), ray.get_runtime_context().get_job_id()
    kind: Any = gcs_pb2.PlacementGroupTableData  # type: ignore[attr-defined]
    for table in cluster_state._connect_and_get_accessor().get_placement_group_table():
        group = kind.FromString(table)
        is_there = group.state != kind.REMOVED and group.creator_job_id.hex() == job
        for bundle in group.bundles if is_there else ():
            free = room.setdefault(bundle.node_id.hex(), {})  # of no node, where it has no place yet
            for name, amount in bundle.unit_resources.items():
                free[name] = free.get(name, 0.0) + amount
    return sum(count_fitting(room[node], dict(per_worker)) for node in present_nodes() if node in room)


def present_nodes() -> set[str]:
    """The ids of the nodes that are there and stay."""
    leaving = cluster_state.get_draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    with ThreadPoolExecutor(DIALS) as threads:
        answers = list(threads.map(answers_now, nodes))
    return {node["NodeID"] for node, answered in zip(nodes, answers, strict=True) if answered}


def answers_now(node: Mapping[str, Any]) -> bool:
    """Whether this node's raylet can be reached, by what ray.nodes() says of it."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_S).close()
    except OSError:
        return False
    return True
