"""Environment variables of the command: those that workers get, and those that the task reads and that differ there.

No value is written down or shown: it may be a password.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from raytrain.config.environment import is_own, travels
from raytrain.config.sections import Config
from raytrain.engine.world import World

READS = ("environ", "getenv", "expandvars")  # of os and os.path: one of them is in a file that reads a variable
INSTALLED = re.compile(r"(site|dist)-packages|python3\.\d+")  # folders
METHODS = ("get", "pop", "setdefault", "__getitem__")


@dataclasses.dataclass(frozen=True)
class Environment:
    """Of the process that keeps a run going, for its workers.

    values:  of the variables that SCALE.ENV names
    digests: of those that the task's files read; None where it is not set.   readers: these files
    """

    # Without repr: by that Ray could show what a job is told.
    values: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    digests: Mapping[str, str | None] = dataclasses.field(default_factory=dict, repr=False)
    readers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def differing(self, environ: Mapping[str, str]) -> list[str]:
        """The variables that the task reads and that have another value there."""
        return [name for name, digest in self.digests.items() if digest_of(environ.get(name)) != digest]


def environment_of(cfg: Config, environ: Mapping[str, str] = os.environ) -> Environment:
    """Of this process, where the task's module is imported."""
    readers = variables_read_by(cfg.TASK.partition(":")[0])
    return Environment(
        values_of(cfg, environ), {name: digest_of(environ.get(name)) for name in sorted(readers)}, readers
    )


def values_of(cfg: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """Of the variables that SCALE.ENV names, as far as they are set."""
    return {name: value for name, value in environ.items() if travels(name, cfg.SCALE.ENV)}


def digest_of(value: str | None) -> str | None:
    return None if value is None else hashlib.sha256(os.fsencode(value)).hexdigest()


def differences(environment: Environment, world: World) -> list[str]:
    """Collective. On rank 0, a line on variables that the task reads and that some worker has not as the command has
    them; none where there are none. Before the task is made: it may set some."""
    by_rank = world.gather_objects(environment.differing(os.environ))
    ranks = {name: [rank for rank, names in enumerate(by_rank) if name in names] for name in environment.digests}
    return told(environment, {name: f"rank {', '.join(map(str, those))}" for name, those in ranks.items() if those})


def told(environment: Environment, places: Mapping[str, str]) -> list[str]:
    """places: where a variable differs, by its name"""
    if not places:
        return []
    listed = ", ".join(f"{name} ({environment.readers[name]}; {place})" for name, place in places.items())
    here = [name for name in places if environment.digests[name] is not None]
    there = [name for name in places if environment.digests[name] is None]
    fix = [f"SCALE.ENV: [{', '.join(here)}] has workers get it from the command"] if here else []
    fix += [f"{', '.join(there)} is set there and not here: unset it there, or set it here"] if there else []
    return [f"the task reads variables that workers do not have as the command has them: {listed}. {'; '.join(fix)}"]


def variables_read_by(module_name: str) -> dict[str, str]:
    """The variables that a module and those of its folder read, as far as they are imported: name -> file."""
    readers: dict[str, str] = {}
    for path in files_of(module_name):
        text = path.read_text(errors="replace")
        if any(word in text for word in READS):
            for name in variables_in(text):
                readers.setdefault(name, path.name)
    return {name: file for name, file in readers.items() if not is_own(name)}


def files_of(module_name: str) -> Iterator[Path]:
    """The source of a module that is imported, and of the others from its folder and those below."""
    first = file_of(sys.modules.get(module_name))
    if first is None or not Path(first).is_file():
        return
    yield Path(first)
    folder = f"{Path(first).parent}{os.sep}"
    others = {file for file in map(file_of, list(sys.modules.values())) if file is not None and file.startswith(folder)}
    for path in map(Path, sorted(others - {first})):
        # Not all that is installed, where an environment lies beside the task, or the task in one.
        if not any(map(INSTALLED.fullmatch, path.parts[len(Path(folder).parts) - 1 :])) and path.is_file():
            yield path


def file_of(module: ModuleType | None) -> str | None:
    """Where the source of a module is, if it is there."""
    file = vars(module).get("__file__") if isinstance(module, ModuleType) else None
    return file if isinstance(file, str) and file.endswith(".py") else None


def variables_in(source: str) -> set[str]:
    """The environment variables that Python source reads by name, or by a constant of its own.

    os.environ["A"], os.environ.get("A"), "A" in os.environ, os.getenv("A"), os.path.expandvars("$A"), by any alias.
    """
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):  # of another version of Python; its import has said so
        return set()
    texts, aliases = constants_in(nodes), aliases_in(nodes)

    def is_(node: ast.AST, name: str) -> bool:
        return aliases.get(last_name(node)) == name

    def text(node: ast.AST) -> str:
        value = node.value if isinstance(node, ast.Constant) else texts.get(last_name(node))
        return value if isinstance(value, str) else ""

    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and is_(node.value, "environ"):
            names.add(text(node.slice))
        elif isinstance(node, ast.Compare) and is_(node.comparators[0], "environ"):
            names.add(text(node.left))
        elif isinstance(node, ast.Call) and node.args:
            function, first = node.func, text(node.args[0])
            is_method = isinstance(function, ast.Attribute) and function.attr in METHODS
            if is_(function, "getenv") or (is_method and is_(function.value, "environ")):  # type: ignore[attr-defined]
                names.add(first)
            elif is_(function, "expandvars"):
                names |= set(re.findall(r"\$\{?(\w+)", first))
    return names - {""}


def constants_in(nodes: list[ast.AST]) -> dict[str, str]:
    """Names that stand for a text: A = "text"."""
    return {
        last_name(target): node.value.value
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
    }


def aliases_in(nodes: list[ast.AST]) -> dict[str, str]:
    """What the READS are called: their names, A of `from os import environ as A`, A of A = os.environ."""
    aliases = {name: name for name in READS}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "os.path"):
            aliases |= {name.asname: name.name for name in node.names if name.asname and name.name in READS}
        elif isinstance(node, ast.Assign) and last_name(node.value) in READS:
            aliases |= {last_name(target): last_name(node.value) for target in node.targets}
    return aliases


def last_name(node: ast.AST) -> str:
    """`c` of a.b.c and of c; "" of what has no name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
