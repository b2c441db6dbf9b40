"""README.md and docs/ say what is so: links lead somewhere, names exist, examples are valid."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from pages import PAGES, README, ROOT, Block, anchors, blocks, commands, prose, write_examples

from raytrain.cli import build_parser
from raytrain.config.load import Config, load_config
from raytrain.config.schema import dotted_keys

PACKAGE = ROOT / "raytrain"
OTHERS_FLAGS = {"--max_restarts"}  # torchrun's
OF_A_RUN = ("ckpt/", "eval/", "view/", "logs/", "tensorboard/", "output/", "trial_0007/")
OF_OPENPCDET = ("cfgs/", "tools/")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def test_the_readme_is_read_in_five_minutes():
    assert len(README.read_text().splitlines()) <= 150


def test_no_page_is_left_out():
    assert set(PAGES) == {README, *(ROOT / "docs").rglob("*.md")}


@every_page
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@every_page
def test_files_and_folders_that_a_page_names_exist(page: Path):
    written = {block.file for block in blocks()}
    for name in re.findall(r"`([a-z_]+(?:/[\w.-]+)*(?:\.py|/))`", prose(page)):
        if name not in written and not name.startswith((*OF_A_RUN, *OF_OPENPCDET)):
            assert any((root / name).exists() for root in (ROOT, PACKAGE)), name


@every_page
def test_what_a_page_says_to_be_in_a_module_is_there(page: Path):
    """`name` in `module.py`, `name` of `module.py`."""
    for name, module in re.findall(r"`(\w+)` (?:in|of) `([\w/]+\.py)`", prose(page)):
        path = next(root / module for root in (ROOT, PACKAGE) if (root / module).exists())
        assert name in defined(path), f"{module} has no {name}"


def defined(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {each.id for each in node.targets if isinstance(each, ast.Name)}
    return names


@every_page
def test_config_keys_and_flags_that_a_page_names_exist(page: Path):
    keys, sections = dotted_keys(Config), "OPTIMIZATION|SCALE|LOADER|CHECKPOINT|EVAL|LOG|TUNE|HOOK"
    for key in re.findall(rf"`((?:{sections})\.[A-Za-z_0-9]+)", prose(page)):
        assert key in keys, key
    (commands,) = (action.choices for action in build_parser()._actions if action.dest == "command")
    flags = {flag for parser in commands.values() for flag in parser._option_string_actions}
    for flag in re.findall(r"`(--[\w-]+)", prose(page)):
        assert flag in flags | OTHERS_FLAGS, flag


def label(block: Block) -> str:
    return block.file or f"{block.page.stem}: {block.text.splitlines()[0]}"


@pytest.mark.parametrize("block", [block for block in blocks() if block.kind == "yaml"], ids=label)
def test_examples_of_configs_are_valid(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One that is a file is whole; another is a part of one."""
    monkeypatch.chdir(tmp_path)
    write_examples(tmp_path)
    if not block.file:
        Path("part.yaml").write_text(f"_BASE_CONFIG_: configs/digits.yaml\n{block.text}")
    load_config(block.file or "part.yaml")


def test_examples_that_are_files_are_used_by_a_command():
    files = {block.file: block.text for block in blocks() if block.file}
    for name in files:
        users = [*map(str, commands()), *(text for other, text in files.items() if other != name)]
        assert re.search(rf"\b{Path(name).stem}\b", "\n".join(users)), name


def test_examples_in_python_say_which_file_they_are_and_each_has_a_name_of_its_own():
    named = [block.file for block in blocks() if block.kind == "python" or block.file]
    assert all(named) and len(named) == len(set(named))


def test_a_task_is_about_fifteen_lines():
    task = next(block.text for block in blocks() if block.file == "mytask.py")
    assert len([line for line in task.splitlines() if line.strip() and not line.startswith("#")]) <= 15
