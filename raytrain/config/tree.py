"""Free mappings of a config: what only the task knows how to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import core_schema


class Tree(dict[str, Any]):
    """A dict whose keys are attributes too: cfg.MODEL.VFE.NAME. Nested dicts become Trees."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.update(*args, **kwargs)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, _treed(value))

    def __getattr__(self, key: str) -> Any:
        if key in self:
            return self[key]
        raise AttributeError(f"the config has no {key} here; its keys are {', '.join(self) or 'none'}")

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(_tree)


def _treed(value: Any) -> Any:
    if isinstance(value, dict):
        return Tree(value)
    if isinstance(value, (list, tuple)):
        return [_treed(item) for item in value]
    return value


def _tree(value: Any) -> Tree:
    if not isinstance(value, Mapping):
        raise ValueError("it must be a mapping")
    return Tree(value)


def plain(value: Any) -> Any:
    """The value as dicts, lists and scalars, which every program can read."""
    if isinstance(value, BaseModel):
        return {key: plain(item) for key, item in value}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def at(tree: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, whose parts name keys of mappings and indices of lists; None where there is none."""
    found: Any = tree
    for part in key.split("."):
        if isinstance(found, list):
            found = found[int(part)] if part.isdecimal() and int(part) < len(found) else None
        else:
            found = found.get(part) if isinstance(found, Mapping) else None
    return found
