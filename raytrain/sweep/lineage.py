"""What the weights of a sweep's trial follow from: its params, and for a clone those of the trials before it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable

from raytrain.config.load import with_phase
from raytrain.config.sections import Config
from raytrain.journal.records import Record
from raytrain.sweep.space import Params, trial_config

RESUME_POINT = "resume_point.json"  # in what Ray Tune holds as a trial's checkpoint


@dataclasses.dataclass(frozen=True)
class Lineage:
    """What a trial's weights follow from, beside the sweep's config.

    base: its params;   phases: from which epoch on it had which others instead
    """

    base: Params
    phases: tuple[tuple[int, Params], ...] = ()

    @property
    def params(self) -> Params:
        """Those in force."""
        return self.phases[-1][1] if self.phases else self.base

    def changed(self, epoch: int, params: Params) -> Lineage:
        """It went like this until `epoch` was finished, and goes on with `params`."""
        if epoch == 0:
            return Lineage(params)
        before = tuple(phase for phase in self.phases if phase[0] < epoch)
        same = (before[-1][1] if before else self.base) == params
        return Lineage(self.base, before if same else (*before, (epoch, params)))

    def key(self, epoch: int) -> str:
        """Names what its weights after `epoch` epochs follow from."""
        causes = [self.base, [phase for phase in self.phases if phase[0] < epoch]]
        return hashlib.sha256(json.dumps(causes, sort_keys=True).encode()).hexdigest()[:12]

    def config(self, cfg: Config, number: int) -> Config:
        """Of the run that trial `number` of the sweep `cfg` is."""
        own = trial_config(cfg, self.base, number)
        for epoch, params in self.phases:
            own = with_phase(own, epoch, params)
        return own


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """Where a trial goes on: from what `trial`, itself or the one that it clones, was after `epoch`.

    seconds: of its own training so far
    """

    trial: int
    lineage: Lineage
    epoch: int
    seconds: float

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @staticmethod
    def of_json(text: bytes) -> ResumePoint:
        fields = json.loads(text)
        phases = tuple((epoch, params) for epoch, params in fields["lineage"]["phases"])
        return ResumePoint(**{**fields, "lineage": Lineage(fields["lineage"]["base"], phases)})


def lineages_of(records: Iterable[Record]) -> dict[int, Lineage]:
    """By trial, as a ledger tells them."""
    lineages: dict[int, Lineage] = {}
    for record in records:
        if record["kind"] == "trial":
            lineages[record["trial"]] = Lineage(record["params"])
        elif record["kind"] == "clone":
            lineages[record["trial"]] = lineages[record["from"]].changed(record["epoch"], record["params"])
    return lineages
