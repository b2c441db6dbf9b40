"""Every key of a config as a page for people: what it may be, its default, what it means."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from raytrain.config.schema import legal, plain, section_in, shown

HEAD = """\
## Every key

Printed by `raytrain show-config --reference`. A key that has no default must be given."""


def reference(model: type[BaseModel]) -> str:
    """Markdown: a table for each section of `model`, which is the top level."""
    return "\n\n".join([HEAD, *(section_text(*each) for each in sections(model))])


def sections(model: type[BaseModel], name: str = "") -> Iterator[tuple[str, type[BaseModel], bool]]:
    """(dotted name, section, whether it stands in a list) of `model` and of all below it, in their order."""
    yield name, model, False
    for key, annotation in annotations_of(model).items():
        dotted = f"{name}.{key}".lstrip(".")
        if get_origin(annotation) is list and (entry := section_in(get_args(annotation)[0])):
            yield dotted, entry, True
        elif section := section_in(annotation):
            yield from sections(section, dotted)


def section_text(name: str, model: type[BaseModel], in_list: bool) -> str:
    """The heading and the table of one section."""
    meaning = meanings(model)
    lines = [f"### {name or 'The top level'}", ""]
    if in_list:
        lines += ["Of each entry of the list. A key that is not given stays as it was.", ""]
    lines += ["| key | what it may be | default | meaning |", "| --- | --- | --- | --- |"]
    for key, annotation in annotations_of(model).items():
        field = model.model_fields[key]
        may_be = linked(annotation, f"{name}.{key}".lstrip(".")) or legal(annotation)
        default = "" if field.is_required() or in_list else default_text(field.default)
        cells = [f"`{key}`", may_be, default, meaning[key]]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def annotations_of(model: type[BaseModel]) -> dict[str, Any]:
    """What each key may be; limits included."""
    hints = get_type_hints(model, include_extras=True)
    return {key: hints[key] for key in model.model_fields}


def linked(annotation: Any, dotted: str) -> str | None:
    """A link to the table of the key's own keys; None where it has none."""
    if get_origin(annotation) is list:
        return f"a list of [sections](#{anchor(dotted)})" if section_in(get_args(annotation)[0]) else None
    return f"[a section](#{anchor(dotted)})" if section_in(annotation) else None


def default_text(default: Any) -> str:
    """The value as YAML has it; of a section the keys have defaults of their own."""
    return "its keys' defaults" if isinstance(default, BaseModel) else f"`{shown(plain(default))}`"


def anchor(dotted: str) -> str:
    """What links to the heading of a section, as GitHub makes it."""
    return dotted.lower().replace(".", "")


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """What the `#:` comments before and behind each key in the source say, as one line."""
    source = textwrap.dedent(inspect.getsource(model))
    lines, begin, found = source.splitlines(), 0, {}
    (section,) = ast.parse(source).body
    assert isinstance(section, ast.ClassDef)
    for statement in section.body:
        end = statement.end_lineno or 0
        if isinstance(statement, ast.AnnAssign):
            said = re.findall(r"#: (.*)", "\n".join(lines[begin:end]))
            found[ast.unparse(statement.target)] = " ".join(said)
        begin = end
    return found
