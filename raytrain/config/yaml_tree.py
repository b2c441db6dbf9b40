"""YAML files as trees, `_BASE_CONFIG_` followed: mappings merge, the top keys of a base replace."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import yaml

from raytrain.config.yaml_text import Node, NodeBuilder, compose, line_of
from raytrain.errors import ConfigError

BASE = "_BASE_CONFIG_"
CONFIGS = "cfgs"  # OpenPCDet's folder of all configs; the paths of bases are from the folder that it is in
# Far beyond any config: what is larger would fill the memory before it could be found wrong.
MAX_BYTES = 4_000_000


def read_tree(path: Path) -> Node:
    """The mapping that a YAML file holds, with every `_BASE_CONFIG_` in it resolved."""
    return _File(path, chain=()).tree()


class _File:
    """One YAML file of a configuration. `chain` holds the files whose bases led here, outermost first."""

    def __init__(self, path: Path, chain: tuple[Path, ...]) -> None:
        self.path = path
        self.chain = (*chain, path)

    def tree(self) -> Node:
        node = compose(_read_text(self.path), str(self.path))
        if node is None:
            raise ConfigError(f"{self.path}:1: the file is empty; it must hold a mapping (`KEY: value` lines)")
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else f"the single value {node.value!r}"
            raise ConfigError(
                f"{line_of(self.path, node)}: found {kind}; a config must be a mapping (`KEY: value` lines)"
            )
        return self.merged(None, NodeBuilder(str(self.path)).node(node, (), line_of(self.path, node)))

    def merged(self, old: Node | None, new: Node) -> Node:
        """`new` over `old`: mappings merge, the top keys of a base replace, anything else replaces whole."""
        if isinstance(new.value, list):
            return Node([self.merged(None, child) for child in new.value], new.where)
        if not isinstance(new.value, dict):
            return new
        entries = dict(old.value) if old is not None and isinstance(old.value, dict) else {}
        if BASE in new.value:
            entries.update(self.base(new.value[BASE]).value)
        for key, child in new.value.items():
            if key != BASE:
                entries[key] = self.merged(entries.get(key), child)
        return Node(entries, new.where)

    def base(self, named: Node) -> Node:
        """The tree of the file that a `_BASE_CONFIG_` names."""
        if not isinstance(named.value, str) or not named.value:
            raise ConfigError(
                f"{named.where}: {BASE} is {named.plain()!r}; it must be the path of one YAML file, "
                f"relative to {self.path}"
            )
        path = self.found(named)
        seen = [link.resolve() for link in self.chain]
        if path.resolve() in seen:
            circle = [*self.chain[seen.index(path.resolve()) :], path]
            raise ConfigError(f"{named.where}: {BASE} goes in a circle: " + " -> ".join(map(str, circle)))
        return _File(path, self.chain).tree()

    def found(self, named: Node) -> Path:
        """The file that is meant: beside this one, else as OpenPCDet has it, which reads its configs in tools/."""
        above = configs_above(self.path)
        roots = [self.path.parent, *([] if above is None else [above]), Path()]
        paths = list(dict.fromkeys(Path(os.path.normpath(_seen_from_here(root / named.value))) for root in roots))
        found = next((path for path in paths if path.is_file()), None)
        if found is None:
            elsewhere = "".join(f", nor {path}" for path in paths[1:])
            raise ConfigError(f"{named.where}: {BASE} is {named.value!r}, but {_missing(paths[0], elsewhere)}")
        return found


def configs_above(path: Path) -> Path | None:
    """The folder that holds the `cfgs` that a file lies in: OpenPCDet's tools. None if it lies in none."""
    return next((folder.parent for folder in path.absolute().parents if folder.name == CONFIGS), None)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(_missing(path)) from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: this is a folder; name one YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES:,} bytes, so this is no config; name one YAML file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: found the byte {data[error.start]:#04x}; the file must be UTF-8") from None


def _seen_from_here(path: Path) -> Path:
    """The shorter way to write it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _missing(path: Path, elsewhere: str = "") -> str:
    """That there is no file `path`, and what was probably meant.   elsewhere: `, nor other/path` for other places"""
    text = f"{path}: there is no such file{elsewhere}"
    siblings = [other.name for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"{text}; did you mean {path.parent / near[0]}?" if near else text
