"""Sets of names have one order in all processes that a command starts, and a seed that a user has set is honoured."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

from raytrain import cli

BEGIN = "from raytrain import hash_seed\nif hash_seed.may_begin_again():\n    hash_seed.begin_again()\n"
TELL = "print(hash_seed.hash_seed(), list({'cat', 'dog', 'fox', 'owl', 'pig'}))"
LATE = "import os\nos.environ['PYTHONHASHSEED'] = '7'\n"


def said(code: str, env: Mapping[str, str], *options: str) -> str:
    """What a process of that code prints, without a PYTHONHASHSEED but for `env`'s."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    command = [sys.executable, *options, "-c", code, "train", "--cfg_file", "a b.yaml"]
    return subprocess.run(command, env={**inherited, **env}, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("env", "code", "seed"),
    [
        ({}, BEGIN + TELL, "0"),
        ({"PYTHONHASHSEED": ""}, BEGIN + TELL, "0"),
        ({"PYTHONHASHSEED": "0"}, BEGIN + TELL, "0"),
        ({"PYTHONHASHSEED": "5"}, BEGIN + TELL, "5"),
        ({"PYTHONHASHSEED": "random"}, BEGIN + TELL, "random"),
        ({}, BEGIN.splitlines()[0] + "\n" + TELL, "random"),
        ({}, LATE + BEGIN + TELL, "random"),  # Python has read it before: in vain
        ({"PYTHONHASHSEED": "5"}, LATE + BEGIN + TELL, "random"),  # it is 5, but nothing says so any more
        ({}, "import sys\nsys.settrace(lambda *_: None)\n" + BEGIN + TELL, "random"),
        ({}, "import sys\nsys.argv = ['raytrain', 'train']\n" + BEGIN + TELL, "random"),
    ],
)
def test_the_seed_that_a_process_has_is_known(env, code, seed):
    first = said(code, env)
    assert first.split()[0] == seed
    if seed != "random":
        assert said(code, env) == first


def test_a_process_begins_again_as_it_was_started():
    code = "import sys\n" + BEGIN + "print(sys.argv, sys.flags.optimize, sys.warnoptions)"
    assert said(code, {}, "-O", "-W", "error").strip() == "['-c', 'train', '--cfg_file', 'a b.yaml'] 1 ['error']"


@pytest.mark.parametrize(
    ("line", "runs"),
    [
        ("train --cfg_file x.yaml", True),
        ("tune --cfg_file x.yaml", True),
        ("eval --cfg_file x.yaml", True),
        ("view --cfg_file x.yaml", True),
        ("prove --cfg_file x.yaml", True),
        ("checkpoints run", False),
        ("show-config --reference", False),
        ("simulate out", False),
        ("train --help", False),
        ("--help", False),
        ("--version", False),
        ("", False),
    ],
)
def test_only_commands_that_run_a_task_begin_again(line, runs):
    assert cli.runs_a_task(line.split()) is runs
