"""What a run is of: its YAML file, and the task's code.

The code is the task's module and what that imports from beside it, told apart by the bytes of the files.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raytrain.engine.world import World
from raytrain.errors import is_users, listed
from raytrain.task import load_task_class

DIGITS = 12  # of each file's sha256
# Import statements alone are parsed: of 1,000 lines that takes 2.7 ms, and all of them 14.
IMPORT = re.compile(
    rb"""^[ \t]*((?:from|import)[ \t][^\n#;(\\]*(?:\((?:[^()#"']|\#[^\n]*)*\)|(?:\\\r?\n[^\n#;\\]*)+)?)""", re.MULTILINE
)
INSTALLED = ("site-packages", "dist-packages")


def source_of(task: str) -> dict[str, str]:
    """The first digits of the sha256 of each file that the task at this dotted path is made of.

    By the file's path below the folder that it is imported from. The file of its module, and those of the modules
    that this and they import, in functions too: the user's own, not what is installed. Empty where there is no file:
    in a notebook.
    """
    load_task_class(task)
    name = task.partition(":")[0]
    path = Path(getattr(sys.modules[name], "__file__", None) or "").absolute()
    if not path.is_file():
        return {}
    package = path.stem == "__init__"
    root = path.parents[name.count(".") + package]
    modules = Modules(root, name.partition(".")[0])
    unread = [(path.relative_to(root).as_posix(), root, name if package else name.rpartition(".")[0])]
    unread += modules.files(name)
    found: dict[str, str] = {}
    looked_for: set[str] = set()
    while unread:
        file, folder, within = unread.pop()
        if file not in found:
            content = (folder / file).read_bytes()
            found[file] = hashlib.sha256(content).hexdigest()[:DIGITS]
            new = set(imports(content, within)) - looked_for
            looked_for |= new
            unread += [each for imported in new for each in modules.files(imported)]
    return dict(sorted(found.items()))


def imports(content: bytes, package: str) -> Iterator[str]:
    """The dotted names that a module of `package` may import; of `from a import b` also a.b, which may be a module."""
    for statement in IMPORT.finditer(content):
        try:
            [node] = ast.parse(statement[1].strip()).body
        except (SyntaxError, ValueError):  # words of a docstring
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -(node.level - 1) or None] if node.level and package else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from filter(None, [base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)])


class Modules:
    """Finds the user's modules beside the task, and in the other folders that are searched, but what is installed."""

    def __init__(self, root: Path, top: str) -> None:
        """root: the folder that the task's module is imported from, whose first name is `top`."""
        searched = dict.fromkeys([root, *(Path(entry).absolute() for entry in sys.path)])
        libraries = sysconfig.get_path("stdlib")
        self._roots = [at for at in searched if at.name not in INSTALLED and not str(at).startswith(libraries)]
        self._root, self._top = root, top
        self._homes: dict[str, Path | None] = {}

    def files(self, module: str) -> Iterator[tuple[str, Path, str]]:
        """(path below its folder, the folder, its package) of a module, and of the packages around it."""
        parts = module.split(".")
        if parts[0] not in self._homes:
            self._homes[parts[0]] = self._home(parts[0])
        home = self._homes[parts[0]]
        if home is None:
            return
        named = [("/".join(parts) + ".py", ".".join(parts[:-1]))]
        named += [("/".join([*parts[:n], "__init__.py"]), ".".join(parts[:n])) for n in range(1, len(parts) + 1)]
        for file, package in named:
            if (home / file).is_file() and is_users(str(home / file)):
                yield file, home, package

    def _home(self, top: str) -> Path | None:
        """The folder that holds the module or package of this name; None where it is not the user's."""
        if self._root.name in INSTALLED and top == self._top:
            return self._root
        modules = [at for at in self._roots if (at / f"{top}.py").is_file() or (at / top / "__init__.py").is_file()]
        folders = [at for at in self._roots if (at / top).is_dir()]  # packages without a file of their own come last
        return next(iter(modules + folders), None)


def differing(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """What has become of each file that differs, in words; nothing where one of the two is not known."""
    if not old or not new:
        return []
    changed = [f"{name} has changed" for name in old if name in new and old[name] != new[name]]
    gone = [f"{name} is used no more" for name in old if name not in new]
    return [*changed, *gone, *(f"{name} is new" for name in new if name not in old)]


def source_notes(old: Mapping[str, str], new: Mapping[str, str], whose: str = "the checkpoint's") -> list[str]:
    """A line if the task's code is not what it was. Whether that matters, who changed it knows."""
    changes = differing(old, new)
    return [f"the task's code differs from {whose}: {listed(changes)}"] if changes else []


def ranks_of_other_source(world: World, source: Mapping[str, str]) -> list[str]:
    """Collective. A line for each rank that runs other code than rank 0: a checkout of its host that is old."""
    first, *others = world.all_objects(dict(source))
    lines = [(rank, differing(first, other)) for rank, other in enumerate(others, 1)]
    return [f"the task's code on rank {rank} differs from rank 0's: {listed(what)}" for rank, what in lines if what]


def other_file(before: Any, now: str) -> list[str]:
    """A line if a folder's YAML file was not the one that it is now, but a namesake, or the same before it moved."""
    if not isinstance(before, str) or not before or not now or before == now:
        return []
    begun, is_here = f"what lies in this folder was begun by {before}", False
    with contextlib.suppress(OSError):  # it is somebody else's, or `now` is only what a copy of the config says
        is_here = Path(before).exists()
        if is_here and Path(before).samefile(now):
            return []
    if not is_here:
        return [f"{begun}, which is not here: taken to be {now}, moved"]
    return [
        f"{begun}, and this is {now}; if they are two projects, keep them apart: --extra_tag NAME, or a TAG of its own "
        "in one of the files"
    ]
