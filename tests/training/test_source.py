"""Which files a task's code is, and what is said of those that differ."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from raytrain.errors import NAMES_SHOWN
from raytrain.training.source import source_notes, source_of

TASK = "import raytrain\n\n\nclass Own(raytrain.Task):\n    pass\n"
# The task's module, the files that there are ("{0}" is a name of their own), and those that count beside the module's.
LAYOUTS: dict[str, tuple[str, dict[str, str], list[str]]] = {
    "a file by itself": ("{0}", {"{0}.py": "import torch, os", "other.py": ""}, []),
    "a sibling, and what that imports": (
        "{0}",
        {"{0}.py": "import {0}_a", "{0}_a.py": "from {0}_b import x", "{0}_b.py": "x = 1"},
        ["{0}_a.py", "{0}_b.py"],
    ),
    "an import in a function": (
        "{0}",
        {"{0}.py": "def f():\n    from {0}_a import g", "{0}_a.py": "g = 1"},
        ["{0}_a.py"],
    ),
    "several lines, with comments in between": (
        "{0}",
        {
            "{0}.py": "from {0}_p import (  # noqa\n    a,  # nets (user's)\n    b,\n)\nfrom {0}_p \\\n    import c",
            **dict.fromkeys(["{0}_p/__init__.py", "{0}_p/a.py", "{0}_p/b.py", "{0}_p/c.py", "{0}_p/d.py"], ""),
        },
        ["{0}_p/__init__.py", "{0}_p/a.py", "{0}_p/b.py", "{0}_p/c.py"],
    ),
    "relative imports in a package": (
        "{0}.sub.task",
        {
            "{0}/sub/task.py": "from . import a\nfrom ..nets import b",
            "{0}/nets/b.py": "from .c import d",
            "{0}/nets/c.py": "d = 1",
            **dict.fromkeys(["{0}/__init__.py", "{0}/sub/__init__.py", "{0}/sub/a.py", "{0}/sub/b.py"], ""),
        },
        ["{0}/__init__.py", "{0}/nets/b.py", "{0}/nets/c.py", "{0}/sub/__init__.py", "{0}/sub/a.py"],
    ),
    "the task in the file of a package": (
        "{0}",
        {"{0}/__init__.py": "from .a import b", "{0}/a.py": "b = 1", "a.py": ""},
        ["{0}/a.py"],
    ),
    "lines of text that begin like an import": (
        "{0}",
        {"{0}.py": '"""\nfrom here on, and\nimport anchors (see there\n"""\nimport {0}_a', "{0}_a.py": ""},
        ["{0}_a.py"],
    ),
    "two that import each other": (
        "{0}",
        {"{0}.py": "def f():\n    import {0}_a", "{0}_a.py": "import {0}"},
        ["{0}_a.py"],
    ),
    "what is not there, or is no python": (
        "{0}",
        {"{0}.py": "try:\n    import nowhere, {0}_a\nexcept ImportError:\n    pass", "{0}_a.py": "broken ("},
        ["{0}_a.py"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_code_of_a_task_is_its_module_and_what_that_imports_from_beside_it(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"code{list(LAYOUTS).index(layout)}"
    module, files, counts = LAYOUTS[layout]
    module, own = module.format(name), next(iter(files)).format(name)
    for file, content in files.items():
        path = tmp_path / file.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content.format(name) + "\n")
    (tmp_path / own).write_text((tmp_path / own).read_text() + TASK)
    monkeypatch.syspath_prepend(tmp_path)
    wanted = sorted([own, *(count.format(name) for count in counts)])
    before = source_of(f"{module}:Own")
    assert list(before) == wanted
    for file in wanted:
        (tmp_path / file).write_text((tmp_path / file).read_text() + "# changed\n")
        (note,) = source_notes(before, source_of(f"{module}:Own"))
        assert note == f"the task's code differs from the checkpoint's: {file} has changed"
        before = source_of(f"{module}:Own")


def test_of_installed_packages_the_tasks_own_counts_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "lib" / "site-packages"
    for file in ("instpkg/__init__.py", "instpkg/nets.py", "numbersx/__init__.py"):
        (installed / file).parent.mkdir(parents=True, exist_ok=True)
        (installed / file).write_text("")
    (installed / "instpkg" / "task.py").write_text(f"import numbersx\nfrom instpkg import nets\n{TASK}")
    (tmp_path / "usespkg.py").write_text(f"import instpkg.nets\n{TASK}")
    monkeypatch.syspath_prepend(installed)
    monkeypatch.syspath_prepend(tmp_path)
    assert list(source_of("instpkg.task:Own")) == ["instpkg/__init__.py", "instpkg/nets.py", "instpkg/task.py"]
    assert list(source_of("usespkg:Own")) == ["usespkg.py"]


def test_the_shipped_tasks_are_users_code_and_the_rest_of_raytrain_is_not() -> None:
    assert list(source_of("raytrain.tasks.digits:DigitsTask")) == [
        "raytrain/tasks/__init__.py",
        "raytrain/tasks/digits.py",
    ]


def test_a_task_without_a_file_has_no_code_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("notebook")
    exec(TASK, vars(module))
    monkeypatch.setitem(sys.modules, "notebook", module)
    assert importlib.import_module("notebook") is module
    assert source_of("notebook:Own") == {}


def test_what_is_said_names_each_file_up_to_a_few_and_nothing_where_one_side_is_not_known() -> None:
    old = {f"f{n}.py": "a" for n in range(NAMES_SHOWN + 2)}
    assert source_notes({}, old) == source_notes(old, {}) == source_notes(old, dict(old)) == []
    (note,) = source_notes(old, dict.fromkeys(old, "b"))
    assert note.endswith("f4.py has changed and 2 more")
    (note,) = source_notes({"a.py": "1", "b.py": "1"}, {"a.py": "2", "c.py": "1"}, "the other's")
    assert note == "the task's code differs from the other's: a.py has changed, b.py is used no more, c.py is new"
