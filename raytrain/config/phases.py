"""Values that change in mid-run, written into the config, so that the run stays a function of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytrain.config.load import Config, Phase, with_values
from raytrain.errors import ConfigError

PHASED = {f"OPTIMIZATION.{key}": key for key in Phase.model_fields if key != "FROM_EPOCH"}  # dotted -> key of a phase


def values_at(cfg: Config, epoch: int) -> dict[str, Any]:
    """The values, by dotted key, that hold after `epoch` finished epochs; of the keys that PHASES can change."""
    now = cfg.OPTIMIZATION.in_force(epoch)
    return {dotted: getattr(now, key) for dotted, key in PHASED.items()}


def with_phase(cfg: Config, from_epoch: int, params: Mapping[str, Any]) -> Config:
    """`cfg` with `params` (plain values by dotted key) in force after `from_epoch` finished epochs.

    Its phases from there on are dropped. At epoch 0, where nothing has been trained, the values go in OPTIMIZATION's
    own place. Later a phase is added, of what is not in force there anyway; a ConfigError if another key than
    PHASES can hold is to change.
    """
    phases = [dict(phase) for phase in cfg.OPTIMIZATION.PHASES if from_epoch > phase.FROM_EPOCH]
    if from_epoch == 0:
        return with_values(cfg, {**params, "OPTIMIZATION.PHASES": []})
    before = with_values(cfg, {"OPTIMIZATION.PHASES": phases})
    fixed = {dotted: value for dotted, value in params.items() if dotted not in PHASED}
    differs = sorted(dotted for dotted in fixed if with_values(before, {dotted: fixed[dotted]}) != before)
    if differs:
        raise ConfigError(
            f"after epoch {from_epoch}, in mid-run, {', '.join(differs)} cannot change; what can: {', '.join(PHASED)}"
        )
    now = values_at(before, from_epoch)
    changed = {PHASED[dotted]: params[dotted] for dotted in PHASED if params.get(dotted, now[dotted]) != now[dotted]}
    if not changed:
        return before
    return with_values(cfg, {"OPTIMIZATION.PHASES": [*phases, {"FROM_EPOCH": from_epoch, **changed}]})
