"""YAML text as nodes that know their file and line, numbers as YAML 1.2 has them; and plain values as YAML text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from raytrain.errors import ConfigError

MAX_VALUES = 100_000  # far beyond any config: aliases of aliases would fill the memory first
_TAG = "tag:yaml.org,2002:"
# YAML 1.2 numbers (`1e-3` is one, `010` is ten, `1:30` is text), plus the underscores of Python.
_INT = re.compile(r"[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)$")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)


@dataclasses.dataclass
class Node:
    """A value and the place it comes from.

    value: a scalar, a list of Node or a dict of str to Node
    where: `file:line` of its key (of itself in a list), or `--set`
    """

    value: Any
    where: str

    def plain(self) -> Any:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, key: str | int) -> Node | None:
        """The node at a mapping's key or a list's index, None where there is none."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and str(key).isdecimal() and int(key) < len(self.value):
            return self.value[int(key)]
        return None

    def leaves(self, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Node]]:
        """Every scalar below, with its keys."""
        if isinstance(self.value, dict):
            for key, child in self.value.items():
                yield from child.leaves((*keys, key))
        elif isinstance(self.value, list):
            for index, child in enumerate(self.value):
                yield from child.leaves((*keys, str(index)))
        else:
            yield keys, self


def node_of(value: Any, where: str) -> Node:
    """The tree of a plain value, all of it from one place."""
    if isinstance(value, dict):
        return Node({key: node_of(child, where) for key, child in value.items()}, where)
    if isinstance(value, (list, tuple)):
        return Node([node_of(child, where) for child in value], where)
    return Node(value, where)


def parse_text(text: str, name: str) -> Any:
    """The plain value of a piece of YAML, None if it is empty; `name` stands for the file in errors."""
    node = compose(text, name)
    return None if node is None else NodeBuilder(name).node(node, (), f"{name}:1").plain()


def dump_tree(tree: dict[str, Any]) -> str:
    """YAML text that reads back equal: keys in their order, lists of scalars in one line."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class NodeBuilder:
    """Composed YAML -> Node."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.open: list[yaml.Node] = []  # the collections around the present node
        self.count = 0

    def node(self, node: yaml.Node, keys: tuple[str, ...], where: str) -> Node:
        self.counted(keys, where)
        if any(node is other for other in self.open):
            raise ConfigError(f"{where}: {_dotted(keys)}: an alias (*name) stands inside its own anchor (&name)")
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                pairs = self.pairs(node, keys)
                return Node({k: self.node(v, (*keys, k), at) for k, (v, at) in pairs.items()}, where)
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                items = enumerate(node.value)
                return Node([self.node(v, (*keys, str(i)), line_of(self.name, v)) for i, v in items], where)
            return Node(self.scalar(node, keys, where), where)
        finally:
            self.open.pop()

    def counted(self, keys: tuple[str, ...], where: str) -> None:
        self.count += 1
        if self.count > MAX_VALUES:
            raise ConfigError(
                f"{where}: {_dotted(keys)}: more than {MAX_VALUES:,} values; aliases (*name) of aliases multiply"
            )

    def pairs(self, node: yaml.MappingNode, keys: tuple[str, ...]) -> dict[str, tuple[yaml.Node, str]]:
        """key -> (value, place of the key), `<<` followed; a key that stands twice is an error."""
        merged: dict[str, tuple[yaml.Node, str]] = {}
        own: dict[str, tuple[yaml.Node, str]] = {}
        for key_node, value in node.value:
            at = line_of(self.name, key_node)
            self.counted(keys, at)
            if key_node.tag == _TAG + "merge":
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for source in sources:
                    if not isinstance(source, yaml.MappingNode) or source in self.open:
                        raise ConfigError(f"{at}: {_dotted((*keys, '<<'))} must name other mappings (*alias)")
                    merged = {**self.pairs(source, keys), **merged}
                continue
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a collection"
                raise ConfigError(
                    f"{at}: {_dotted(keys)}: found {shown} as a key; keys must be text, so write it in quotes"
                )
            key = key_node.value
            if key in own:
                first = own[key][1].rpartition(":")[2]
                raise ConfigError(
                    f"{at}: {_dotted((*keys, key))} stands twice (first in line {first}); keep one of them"
                )
            own[key] = (value, at)
        return {**merged, **own}

    def scalar(self, node: yaml.Node, keys: tuple[str, ...], where: str) -> Any:
        text, kind = str(node.value), node.tag.removeprefix(_TAG)
        try:
            if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
                return _SCALARS[kind](text)
        except (ValueError, KeyError):
            text = text if len(text) < 60 else text[:57] + "..."
            raise ConfigError(f"{where}: {_dotted(keys)}: {text} cannot be read as {kind}") from None
        legal = "text, numbers, true/false, null, lists and mappings"
        raise ConfigError(f"{where}: {_dotted(keys)}: found the YAML tag {node.tag}; a config holds {legal} only")


def _int(text: str) -> int:
    prefixed = text.lstrip("+-")[:2].lower() in ("0x", "0o", "0b")
    return int(text.replace("_", ""), 0 if prefixed else 10)


def _float(text: str) -> float:
    return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "null": lambda text: None,
    "bool": lambda text: yaml.SafeLoader.bool_values[text.lower()],
    "int": _int,
    "float": _float,
}


def _resolvers() -> dict[Any, list[Any]]:
    """What an unquoted scalar means: PyYAML's own rules with the numbers of YAML 1.2 and no dates."""
    replaced = {_TAG + name for name in ("int", "float", "timestamp", "value")}
    table: dict[Any, list[Any]] = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in replaced]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for first in "-+.0123456789":
        table.setdefault(first, []).extend([(_TAG + "int", _INT), (_TAG + "float", _FLOAT)])
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()  # so that the text `1e-3` is written in quotes

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        flat = not any(isinstance(item, (dict, list)) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat)


def compose(text: str, name: str) -> yaml.Node | None:
    """PyYAML's node of the only document in `text`, None if there is nothing in it."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        number = mark.line if mark else 0
        lines = text.splitlines()
        line = lines[number] if number < len(lines) else ""
        if "'\\t'" in (error.problem or ""):
            raise ConfigError(f"{name}:{number + 1}: a tab indents {line.strip()!r}; indent with spaces") from None
        begun = error.context_mark.line if error.context_mark else number
        context = f"{error.context} that begins in line {begun + 1}" if begun != number else error.context
        why = ", ".join(part for part in (context, error.problem) if part)
        raise ConfigError(f"{name}:{number + 1}: not valid YAML: {why}; the line reads {line.strip()!r}") from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{name}:{number}: the character {chr(error.character)!r} is not allowed in YAML") from None
    except RecursionError:
        raise ConfigError(f"{name}:1: nested too deeply to be a config") from None


def line_of(name: str | Path, node: yaml.Node) -> str:
    return f"{name}:{node.start_mark.line + 1}"


def _dotted(keys: Sequence[str]) -> str:
    return ".".join(keys) or "the config"
