"""Variables that a task reads: found in its source, compared without a value being shown."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs import LEAST, loaded
from raytrain.engine.world import World
from raytrain.training.environment import Environment, differences, digest_of, environment_of, told, variables_in


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ('import os\nx = os.environ["A"]', "A"),
        ('import os\nx = os.environ.get("A", "8")', "A"),
        ('import os\nx = os.getenv("A") or os.getenv("B", "")', "A B"),
        ('import os as o\nx = o.environ["A"]', "A"),
        ('from os import environ\nx = environ["A"]', "A"),
        ('from os import environ as e, getenv as g\nx = e["A"] + g("B")', "A B"),
        ('import os\nenv = os.environ\nx = env.get("A")', "A"),
        ('import os\nKEY = "A"\nclass C:\n  def f(self): return os.environ[KEY]', "A"),
        ('import os\nx = "A" in os.environ\ny = "B" not in os.environ', "A B"),
        ('import os\nx = os.path.expandvars("$A/data/${B}/x")', "A B"),
        ('import os\nx = os.environ.setdefault("A", "1"); y = os.environ.pop("B", None)', "A B"),
        ('import os\nos.environ["A"] = "1"; del os.environ["B"]', ""),
        ('import os\nx = os.environ[make()]; y = dict(os.environ); z = {}.get("A")', ""),
        ("this is no Python", ""),
    ],
)
def test_the_variables_that_source_reads(source: str, names: str) -> None:
    assert variables_in(source) == set(names.split())


@pytest.fixture
def task_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a task that reads one variable itself and one in a module beside it."""
    (tmp_path / "reads_task.py").write_text('import os, reads_beside\nx = os.environ.get("A"), os.environ.get("RANK")')
    (tmp_path / "reads_beside.py").write_text('import os\nx = os.getenv("MY_SECRET_TOKEN")')
    installed = tmp_path / "env" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "reads_installed.py").write_text('import os\nx = os.getenv("OF_A_PACKAGE")')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(installed))
    for name in ("reads_installed", "reads_task"):
        __import__(name)
    yield "reads_task:Task"
    for name in ("reads_installed", "reads_task", "reads_beside"):
        del sys.modules[name]


def test_those_of_the_task_and_of_what_lies_beside_it_are_known_and_no_value_is(
    tmp_path: Path, task_module: str
) -> None:
    cfg = loaded(tmp_path, LEAST.replace("pkg.module:Class", task_module), "SCALE.ENV", "[A, 'MY_*']")
    environment = environment_of(cfg, {"A": "1", "MY_SECRET_TOKEN": "hunter2", "B": "3"})
    assert environment.values == {"A": "1", "MY_SECRET_TOKEN": "hunter2"}
    assert environment.readers == {"A": "reads_task.py", "MY_SECRET_TOKEN": "reads_beside.py"}
    assert "hunter2" not in repr(environment)
    assert environment.differing({"A": "1", "MY_SECRET_TOKEN": "hunter2"}) == []
    assert environment.differing({"A": "2"}) == ["A", "MY_SECRET_TOKEN"]


def environment(**values: str | None) -> Environment:
    return Environment({}, {name: digest_of(value) for name, value in values.items()}, dict.fromkeys(values, "t.py"))


@pytest.mark.parametrize(
    ("here", "there", "said"),
    [
        ({"A": "1"}, {"A": "1"}, []),
        ({"A": None}, {}, []),
        ({"A": "1"}, {}, ["A (t.py; rank 0). SCALE.ENV: [A] has workers get it"]),
        ({"A": "1"}, {"A": ""}, ["A (t.py; rank 0). SCALE.ENV: [A] has workers get it"]),
        ({"A": None}, {"A": "1"}, ["A (t.py; rank 0). A is set there and not here"]),
        ({"A": "1", "B": None}, {"B": "2"}, ["SCALE.ENV: [A] has workers get it from the command; B is set there"]),
    ],
)
def test_what_differs_is_told_with_what_to_do_and_without_a_value(
    monkeypatch: pytest.MonkeyPatch, here: dict[str, str | None], there: dict[str, str], said: list[str]
) -> None:
    for name in ("A", "B"):
        monkeypatch.setenv(name, there.get(name, ""))
        if name not in there:
            monkeypatch.delenv(name)
    notes = differences(environment(**here), World())
    assert len(notes) == len(said) and all(part in note for part, note in zip(said, notes, strict=True)), notes
    assert told(environment(A="1"), {}) == []
