"""Means over all ranks of what a task measures beside its loss, which ride in the tail of the steps that are recorded.

A task gives what names it likes, a new one in a rare step too. So ranks agree on them at the first step that is
recorded, and again after one of them has met a new name, which a flag of the tail tells the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from raytrain.engine.collectives import nodes_of_all
from raytrain.engine.tail import Tail
from raytrain.engine.terms import MAX_TERMS, Key, Sum, Value, row_of
from raytrain.engine.tree import Additions, merged
from raytrain.engine.world import World


class Terms:
    """Writes this process's sums into the tail before a reduction, and reads the means of all after it.

    notes: lines for the user, to be taken out
    """

    def __init__(self, tail: Tail, world: World, additions: Additions) -> None:
        self._tail, self._world, self._additions = tail, world, additions
        self._keys: list[Key] = []
        self._met: dict[Key, None] = {}  # in the order of the task
        self._agreed = False
        self._beyond: list[torch.Tensor] = []  # of each node here: (n,) numbers that have no room in the tail
        self._holds_some = False
        self.notes: list[str] = []

    def write(self, terms: Sequence[Mapping[Key, Sum]] | None) -> bool:
        """Collective where ranks do not agree on the names. Whether there is a name here that others may not know.

        terms: of each leaf here; None in a step that is not recorded
        """
        if terms is None:
            if self._holds_some:
                self._tail.clear_terms()  # a sum in place would grow from step to step
                self._holds_some = False
            return False
        self._met |= dict.fromkeys(key for of_leaf in terms for key in of_leaf)
        if not self._agreed:
            self._agree()
        rows = [
            row_of([n for key in self._keys for n in of_leaf.get(key, (0.0, 0.0))], self._tail.terms_sum)
            for of_leaf in terms
        ]
        self._beyond = self._tail.write_terms(rows)
        self._holds_some = True
        return not self._met.keys() <= set(self._keys)

    def read(self) -> dict[Key, Value]:
        """Collective where there are more than MAX_TERMS. The mean of each name that some process gave.

        Asking a GPU which ones nobody gave would wait for it; there these are NaN.
        """
        numbers = self._tail.terms_sum[: 2 * len(self._keys)]
        if len(self._keys) > MAX_TERMS:
            numbers = torch.cat([numbers, self._sum_beyond()])
        totals, weights = numbers.view(-1, 2).unbind(1)
        given = weights.tolist() if weights.device.type == "cpu" else [1.0] * len(weights)
        means = (totals / weights).unbind()
        return {key: mean for key, mean, weight in zip(self._keys, means, given, strict=True) if weight}

    def _sum_beyond(self) -> torch.Tensor:
        """Collective. Of all nodes of all processes, in the tree's order."""
        parts = nodes_of_all(self._beyond, self._additions.counts, self._world)
        return merged(parts, self._additions.across.arrivals)[0]

    def new_name_met(self) -> None:
        """Some rank has one that others may not know: the next record begins with agreeing on it."""
        self._agreed = False

    def _agree(self) -> None:
        """Collective. The names of all ranks, in the order of the first one that has them."""
        new = [key for keys in self._world.all_objects(list(self._met)) for key in keys if key not in self._keys]
        if self._keys and new:
            named = ", ".join(sorted({f"{field}[{name!r}]" for field, name in new}))
            self.notes.append(
                f"{named} came up after training began: recorded from here on, as the mean over all workers"
            )
        self._keys += dict.fromkeys(new)
        self._agreed = True
