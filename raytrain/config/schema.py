"""What a pydantic model allows, in words: legal values, known keys, and errors that name file and line."""

from __future__ import annotations

import difflib
import json
import math
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import core_schema

from raytrain.config.yaml_text import Node

_LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Any: "any value",
}


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The model that `annotation` is, or is when it is not None."""
    if get_origin(annotation) is list:
        return None
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def descend(model: type[BaseModel], keys: Sequence[str]) -> tuple[int, Any]:
    """How many of `keys` the schema follows, and the annotation it has there."""
    annotation: Any = model
    for depth, key in enumerate(keys):
        if get_origin(annotation) is list and section_in(get_args(annotation)[0]) is not None:
            annotation = get_args(annotation)[0]
            continue
        section = section_in(annotation)
        if section is None or key not in section.model_fields:
            return depth, annotation
        annotation = get_type_hints(section, include_extras=True)[key]
    return len(keys), annotation


def annotation_at(model: type[BaseModel], keys: Sequence[str]) -> Any:
    """The annotation at `keys`, into lists and dicts too; None where the schema does not say."""
    depth, annotation = descend(model, keys)
    for _ in keys[depth:]:
        while get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        if get_origin(annotation) not in (list, dict):
            return None
        annotation = get_args(annotation)[-1]
    return annotation


def dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of the schema, sections included, in their order."""
    keys = []
    for key, annotation in get_type_hints(model, include_extras=True).items():
        if key not in model.model_fields:
            continue
        keys.append(prefix + key)
        section = section_in(annotation)
        if section is not None:
            keys += dotted_keys(section, f"{prefix}{key}.")
    return keys


def is_default(model: type[BaseModel], dotted: str, value: Any) -> bool:
    """Whether a key of the schema has this plain value where nobody gives it one."""
    *above, key = dotted.split(".")
    section = section_in(annotation_at(model, above)) if above else model
    field = section.model_fields.get(key) if section is not None else None
    return field is not None and not field.is_required() and bool(plain(field.get_default()) == value)


def legal(annotation: Any) -> str:
    """What a value of this annotation may be, in words: `a whole number >= 1 or null`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = [limit for part in args[1:] for limit in (part.metadata if isinstance(part, FieldInfo) else [part])]
        least, most = _limit(limits, "min_length"), _limit(limits, "max_length")
        if get_origin(args[0]) is list and least == most:
            return f"a list of {least} values, each {legal(get_args(args[0])[0])}"
        bounds = [(sign, _limit(limits, name)) for name, sign in _LIMITS.items()]
        words = " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)
        return f"{legal(args[0])} {words}".strip() + (", not empty" if least == 1 else "")
    if origin in (Union, types.UnionType):
        return " or ".join(legal(arg) for arg in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if origin is list:
        return f"a list of values, each {legal(args[0])}"
    section = section_in(annotation)
    if section is not None:
        return "a mapping with the keys " + ", ".join(section.model_fields)
    if origin is dict:
        return f"a mapping of names to {legal(args[1])}"
    return _WORDS.get(annotation, "a mapping")


def shown(value: Any) -> str:
    """The value as YAML would have it, cut to a readable length."""
    if isinstance(value, float) and not math.isfinite(value):
        return f".{value}" if value > 0 or math.isnan(value) else "-.inf"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(dotted: str, model: type[BaseModel]) -> list[str]:
    """The known keys that `dotted` was probably meant to be: other case, other section, or misspelled."""
    section, _, key = dotted.rpartition(".")
    known = dotted_keys(model)
    owner = section_in(annotation_at(model, section.split("."))) if section else model
    here = [f"{section}.{own}".lstrip(".") for own in owner.model_fields] if owner else []
    for pool in (here, known):
        same = [other for other in pool if _folded(other) == _folded(key)]
        if same:
            return same
    for pool, likeness in ((here, 0.6), (known, 0.75)):
        names = {_folded(other): other for other in pool}
        near = difflib.get_close_matches(_folded(key), names, n=1, cutoff=likeness)
        if near:
            return [names[near[0]]]
    return []


def complaints(error: ValidationError, root: Node, model: type[BaseModel]) -> list[tuple[str, str]]:
    """For each wrong key its place, and a line with the dotted key, what was found and what is legal."""
    lines: dict[tuple[str, ...], tuple[str, str]] = {}
    for item in error.errors(include_url=False):
        node, keys = _reached(root, item["loc"])
        if item["type"] == "missing":
            keys = (*keys, str(item["loc"][-1]))
        if keys not in lines:
            lines[keys] = (node.where, _complaint(item, node, keys, model))
    return list(lines.values())


def _complaint(item: Any, node: Node, keys: tuple[str, ...], model: type[BaseModel]) -> str:
    dotted, value = ".".join(keys), node.plain()
    if item["type"] == "extra_forbidden":
        meant = " or ".join(nearest(dotted, model))
        section = section_in(descend(model, keys[:-1])[1]) or model
        owner = ".".join(keys[:-1]) or "the top level"
        hint = f"did you mean {meant}? " if meant else ""
        known = ", ".join(section.model_fields)
        return f"{dotted} is unknown (found {shown(value)}); {hint}Legal keys of {owner}: {known}"
    depth, annotation = descend(model, keys)
    allowed, field = legal(annotation), ".".join(keys[:depth])
    if item["type"] == "missing":
        return f"{dotted} is missing; it must be {allowed}"
    if item["type"] == "value_error":
        return f"{dotted} is {shown(value)}, but {item['ctx']['error']}"
    quoted = isinstance(value, str) and "number" in allowed and _is_number(value) and not node.where.startswith("--")
    hint = "; remove the quotes" if quoted else f"; write '{shown(value)}'" if _unquoted(value, allowed) else ""
    return f"{dotted} is {shown(value)}, but {'it' if field == dotted else field} must be {allowed}{hint}"


def _reached(root: Node, loc: Sequence[str | int]) -> tuple[Node, tuple[str, ...]]:
    """The deepest node on `loc`, and its keys; pydantic ends a `loc` with the names of union branches."""
    node, keys = root, []
    for part in loc:
        child = node.child(part)
        if child is None:
            break
        node = child
        keys.append(str(part))
    return node, tuple(keys)


def _limit(limits: Sequence[Any], name: str) -> Any:
    return next((getattr(limit, name) for limit in limits if getattr(limit, name, None) is not None), None)


def _folded(dotted: str) -> str:
    return dotted.rpartition(".")[2].upper().replace("-", "_").replace(" ", "_")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _unquoted(value: Any, allowed: str) -> bool:
    return allowed.startswith("text") and isinstance(value, (bool, int, float))


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
    value: Any = tree
    for part in key.split("."):
        if isinstance(value, list):
            value = value[int(part)] if part.isdecimal() and int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value
