"""The configuration of a run: how a YAML file becomes it, and how it is written down."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raytrain.config.heritage import is_heritage, put_defaults
from raytrain.config.overrides import apply_overrides, put_value
from raytrain.config.schema import Tree, complaints, shown
from raytrain.config.sections import Config, Phase
from raytrain.config.sweep import swept_problems
from raytrain.config.yaml_text import Node, dump_tree, node_of
from raytrain.config.yaml_tree import read_tree
from raytrain.errors import ConfigError

PHASED = {f"OPTIMIZATION.{key}": key for key in Phase.model_fields if key != "FROM_EPOCH"}  # dotted -> key of a phase


def load_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), flags: Sequence[tuple[str, str, str]] = ()
) -> Config:
    """The checked configuration of a YAML file and the `--set` words after it.

    overrides: dotted key, value, dotted key, value, ...
    flags:     (flag, dotted key, value) of the command line's own flags, which `overrides` override
    Raises ConfigError, one line for each thing that is wrong.
    """
    path = Path(path)
    root = read_tree(path)
    if is_heritage(root):
        put_defaults(root, path)
    for flag, key, word in flags:
        apply_overrides(root, [key, word], Config, flag)
    apply_overrides(root, overrides, Config)
    root.value.setdefault("TAG", Node(path.stem, root.where))
    root.value.setdefault("EXP_GROUP_PATH", Node(_group_path(path), root.where))
    root.value.setdefault("CFG_FILE", Node(str(path.resolve()), root.where))
    return _checked(root)


def with_overrides(cfg: Config, overrides: Sequence[str]) -> Config:
    """A copy of `cfg` with the `--set` words applied, checked as load_config checks."""
    root = node_of(cfg.to_tree(), "config")
    apply_overrides(root, overrides, Config)
    return _checked(root)


def with_values(cfg: Config, values: Mapping[str, Any], where: str = "config") -> Config:
    """A copy of `cfg` with these values (plain, not words) at dotted keys, checked as load_config checks."""
    root = node_of(cfg.to_tree(), where)
    for dotted, value in values.items():
        put_value(root, dotted.split("."), value, Config, where)
    return _checked(root)


def dump_config(cfg: Config) -> str:
    """YAML text of the whole configuration; load_config of it gives an equal one."""
    return dump_tree(cfg.to_tree())


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def config_diff(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of each difference of two plain trees; ABSENT where a key is missing."""
    differences: list[tuple[str, Any, Any]] = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        if isinstance(before, dict) and isinstance(after, dict):
            differences += [(f"{key}.{inner}", *values) for inner, *values in config_diff(before, after)]
        elif before != after or isinstance(before, bool) != isinstance(after, bool):
            differences.append((key, before, after))
    return differences


def _checked(root: Node) -> Config:
    cfg, problems = _read(root)
    if cfg is not None:
        problems += swept_problems(root, cfg.to_tree(), Config, lambda other: _read(other)[1])
    if cfg is None or problems:
        raise ConfigError("\n".join(f"{where}: {line}" for where, line in sorted(problems, key=_place)))
    return cfg


def _read(root: Node) -> tuple[Config | None, list[tuple[str, str]]]:
    """The config that the tree is, its sweep not looked at, and (place, what is wrong); None if that is anything."""
    free = [key for key, field in Config.model_fields.items() if field.annotation is Tree]
    problems = [
        (node.where, f"{'.'.join(keys)} is {shown(node.value)}, but a number must be finite")
        for keys, node in root.leaves()
        if keys[0] in free and isinstance(node.value, float) and not math.isfinite(node.value)
    ]
    try:
        cfg = Config.model_validate(root.plain())
    except ValidationError as error:
        return None, problems + complaints(error, root, Config)
    return (None if problems else cfg), problems


def _place(problem: tuple[str, str]) -> tuple[str, int]:
    file, _, line = problem[0].rpartition(":")
    return file, int(line) if line.isdecimal() else 0


def _group_path(path: Path) -> str:
    """The folders between the root of the configs and the file, which its run folder repeats."""
    folders = path.resolve().parent.parts
    roots = [index for index, name in enumerate(folders) if name in ("cfgs", "configs")]
    if roots:
        return "/".join(folders[roots[-1] + 1 :])
    below = path.resolve().parent
    here = Path.cwd().resolve()
    return "/".join(below.relative_to(here).parts[1:]) if below.is_relative_to(here) else ""


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
