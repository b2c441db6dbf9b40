"""`--set A.B.C value ...`: words of the command line put into a config tree, as a person means them."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Sequence
from typing import Any, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from raytrain.config.schema import annotation_at, legal, nearest, section_in, shown
from raytrain.config.yaml_text import Node, node_of, parse_text
from raytrain.config.yaml_tree import BASE
from raytrain.errors import ConfigError

_NO = object()  # "not of that type"


def apply_overrides(root: Node, words: Sequence[str], model: type[BaseModel], where: str = "--set") -> None:
    """Sets each pair of `words` (dotted key, value) in `root`.

    A value takes the type that `model` gives its key, else the type of the value that was there.
    where: the flag that errors name
    Keys that neither knows are added; checking the tree against the model finds them.
    """
    if isinstance(words, str):
        raise TypeError("overrides must be a list of words, not one string")
    for dotted in words[::2]:
        if dotted.startswith("--"):
            raise ConfigError(
                f"{where}: {dotted} is a flag, but all words after --set are keys and values; put it before"
            )
        key, equals, value = dotted.partition("=")
        if equals:
            raise ConfigError(f"{where}: {dotted}: found `=`; write a space: --set {key} {value}")
    if len(words) % 2:
        raise ConfigError(
            f"{where}: {words[-1]} has no value: found an odd number of words; write pairs: --set A.B value C.D value"
        )
    for dotted, word in zip(words[::2], words[1::2], strict=True):
        keys = dotted.split(".")
        if not all(keys) or BASE in keys:
            raise ConfigError(f"{where}: {dotted!r} is not a key that can be set; write it as SECTION.KEY")
        _apply(root, _named(keys, model), word, model, where)


def _named(keys: list[str], model: type[BaseModel]) -> list[str]:
    """`keys`, in which what follows a mapping of names is one name, dots and all: TUNE.SPACE.OPTIMIZATION.LR."""
    for depth in range(1, len(keys)):
        if get_origin(annotation_at(model, keys[:depth])) is dict:
            return [*keys[:depth], ".".join(keys[depth:])]
    return keys


def _apply(root: Node, keys: list[str], word: str, model: type[BaseModel], where: str) -> None:
    parent, old = _place(root, keys, model, where)
    annotation = annotation_at(model, keys)
    value = parse_word(word)
    untyped = annotation is None and old is not None and isinstance(old.value, dict)
    if (untyped or _is_mapping(annotation)) and value is not None:
        for key, inner in _pairs(keys, word, where).items():
            _apply(root, _named([*keys, *key.split(".")], model), inner, model, where)
        return
    if annotation is not None:
        value = _typed(annotation, _readings(word))
    elif old is not None:
        value = _like_old(old.plain(), _readings(word))
    _put(parent, keys[-1], node_of(value, where))


def put_value(root: Node, keys: list[str], value: Any, model: type[BaseModel], where: str) -> None:
    """Sets the plain `value` at `keys` as it is; a key that `model` does not know is added, as by apply_overrides."""
    parent, _ = _place(root, keys, model, where)
    _put(parent, keys[-1], node_of(value, where))


def _put(parent: Node, key: str, node: Node) -> None:
    if isinstance(parent.value, list):
        parent.value[int(key)] = node
    else:
        parent.value[key] = node


def workers_words(word: str) -> list[str]:
    """What `--num_workers` says as words for apply_overrides: `4`, always; `2-8`, as there is room; `2-`, at least."""
    least, dash, most = word.partition("-")
    if not (least.isdigit() and dash):
        return ["SCALE.MIN_WORKERS", "null", "SCALE.NUM_WORKERS", word]
    return ["SCALE.MIN_WORKERS", least, "SCALE.NUM_WORKERS", most or "null"]


def parse_word(word: str) -> Any:
    """A word as a Python literal, else as YAML, else as the text it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd text that is no Python
            return _plain(ast.literal_eval(word.strip()))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    try:
        value = parse_text(word, "--set")
    except ConfigError:
        return word
    unread = isinstance(value, str) and word.strip()[:1] not in ("'", '"')  # `a #b` is not `a`
    return word if unread or (value is None and word.strip().lower() not in ("null", "~")) else value


def _plain(value: Any) -> Any:
    """A Python literal in YAML's types; ValueError for what YAML cannot hold."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ValueError(value)


def _readings(word: str) -> list[Any]:
    """What `word` may mean, the likeliest first."""
    value = parse_word(word)
    text = value if isinstance(value, str) else word
    parts = [part.strip() for part in text.split(",") if part.strip()]
    readings = [value, [parse_word(part) for part in parts], text, parts]
    return [*readings, None] if text.lower() == "none" else readings


def _pairs(keys: list[str], word: str, where: str) -> dict[str, str]:
    """`a:1,b:2` or a mapping in YAML or Python -> key -> word."""
    value = parse_word(word)
    if isinstance(value, dict):
        return {key: json.dumps(item) for key, item in value.items()}
    parts = [part.partition(":") for part in word.split(",")]
    if all(key.strip() and colon and inner.strip() for key, colon, inner in parts):
        return {key.strip(): inner.strip() for key, _, inner in parts}
    dotted = ".".join(keys)
    raise ConfigError(
        f"{where}: {dotted} is a mapping, but {shown(value)} was given; "
        f"set one of its keys ({dotted}.KEY value) or several ({dotted} a:1,b:2)"
    )


def _place(root: Node, keys: list[str], model: type[BaseModel], where: str) -> tuple[Node, Node | None]:
    """The node that holds the last key, made where it is absent, and what is there now."""
    node = root
    for depth, key in enumerate(keys):
        above, dotted = ".".join(keys[:depth]), ".".join(keys)
        if isinstance(node.value, list):
            if node.child(key) is None:
                raise ConfigError(
                    f"{where}: {dotted}: {above} is a list of {len(node.value)}; {key!r} is none of its indices"
                )
        elif not isinstance(node.value, dict):
            meant = nearest(keys[-1], model)
            hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
            raise ConfigError(f"{where}: {dotted}: {above} is {shown(node.value)}, which has no keys{hint}")
        if depth == len(keys) - 1:
            return node, node.child(key)
        child = node.child(key)
        if child is None or child.value is None:
            annotation = annotation_at(model, keys[: depth + 1])
            if annotation is not None and not _is_mapping(annotation):
                own = ".".join(keys[: depth + 1])
                raise ConfigError(f"{where}: {dotted}: {own} has no keys; it must be {legal(annotation)}")
            child = Node({}, where)
            _put(node, key, child)
        node = child
    raise AssertionError("a key has at least one part")


def _is_mapping(annotation: Any) -> bool:
    free = isinstance(annotation, type) and issubclass(annotation, dict)
    return section_in(annotation) is not None or free or get_origin(annotation) is dict


def _typed(annotation: Any, readings: list[Any]) -> Any:
    """The first reading that the schema accepts; the likeliest if none, for the schema to refuse."""
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    for value in readings:
        try:
            adapter.validate_python(value)
        except ValidationError:
            continue
        return value
    return readings[0]


def _like_old(old: Any, readings: list[Any]) -> Any:
    """The first reading of the type that was there, else the likeliest (a list for a list)."""
    if readings[0] is None:
        return None
    for value in readings:
        converted = _like(old, value)
        if converted is not _NO:
            return converted
    return next((value for value in readings if isinstance(value, list) and isinstance(old, list)), readings[0])


def _like(old: Any, value: Any) -> Any:
    """`value` in the type of `old`, or _NO."""
    if isinstance(old, bool) or isinstance(value, bool):
        return value if isinstance(old, bool) and isinstance(value, bool) else _NO
    if isinstance(old, float):
        return float(value) if isinstance(value, (int, float)) else _NO
    if isinstance(old, int):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return int(value) if whole else _NO
    if isinstance(old, list) and isinstance(value, list):
        items = [_like(old[0], item) for item in value] if old else value
        return _NO if any(item is _NO for item in items) else items
    return value if isinstance(old, str) and isinstance(value, str) else _NO
