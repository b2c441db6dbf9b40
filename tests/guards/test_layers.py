"""Design decisions that a machine can check: imports point down, Ray stays at the edge, the loop stays small.

`python tests/guards/test_layers.py` prints the table, and how often each wing imports from which.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "raytrain"

# What each wing (a folder, or a module beside them) may import of the others, from the ground up.
GROUND = ("errors", "progress", "hash_seed", "launcher")
FILES = ("config", "storage", *GROUND)
ENGINE = ("journal", "task", "batch", *FILES)
TRAINING = ("keeper", "data", "engine", *ENGINE)
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "launcher": ("errors",),
    "progress": (),
    "hash_seed": (),
    "batch": ("errors",),
    "storage": GROUND,
    "config": GROUND,
    "task": ("config", "batch", *GROUND),
    "journal": FILES,
    "engine": ENGINE,
    "data": ("engine", *ENGINE),
    "keeper": ("engine", *ENGINE),
    "training": TRAINING,
    "proof": ("training", *TRAINING),
    "cluster": ("training", *TRAINING),
    "launch": ("cluster", "training", *TRAINING),
    "sweep": ("launch", "cluster", "training", *TRAINING),
    "cli": ("sweep", "launch", "cluster", "proof", "training", *TRAINING),
    "__main__": ("cli",),
}
RAY_AT = ("cluster", "sweep")
# Without torch and numpy: what a command reads before it starts anything, and the keeper, which is small and quick.
WITHOUT_TORCH = (
    *(
        "errors",
        "progress",
        "hash_seed",
        "launcher",
        "config",
        "storage",
        "journal",
        "engine/schedule",
        "sweep/display",
    ),
    *("keeper/keeper", "keeper/client", "keeper/channel", "keeper/shared_memory", "keeper/heartbeat"),
    *("keeper/watchdog", "keeper/writer", "training/checkpoints", "sweep/ledger", "sweep/view", "sweep/advice"),
)
NEEDS_TORCH = ("storage/state_file", "storage/file_layout", "storage/heritage_files")

MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__" and "tasks" not in path.relative_to(PACKAGE).parts
}
every_module = pytest.mark.parametrize("name", MODULES)


def wing(name: str) -> str:
    return name.partition("/")[0]


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text())


def statements(node: ast.AST, at_import: bool) -> Iterator[ast.AST]:
    """All below `node`; at_import: only what runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if at_import and (later or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))):
            continue
        yield child
        yield from statements(child, at_import)


def imports(name: str, at_import: bool = False) -> Iterator[tuple[int, str]]:
    """(line, module) of each import: "engine/guard" of one of ours, the dotted name of another's."""
    for node in statements(tree(name), at_import):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, ours(alias.name)) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}.py:{node.lineno}: write imports in full, not relative"
            if ours(str(node.module)) in MODULES:
                yield node.lineno, ours(str(node.module))
            else:
                yield from ((node.lineno, ours(f"{node.module}.{alias.name}")) for alias in node.names)


def ours(dotted: str) -> str:
    return dotted.removeprefix("raytrain.").replace(".", "/") if dotted.startswith("raytrain.") else dotted


def offenders(name: str, packages: set[str]) -> list[str]:
    return [f"{name}.py:{line}: {found}" for line, found in imports(name) if found.split(".")[0] in packages]


def test_every_wing_has_its_place_in_the_table():
    assert {wing(name) for name in MODULES} == set(MAY_IMPORT)


@every_module
def test_imports_point_down(name):
    for line, found in imports(name):
        if found in MODULES and wing(found) != wing(name):
            assert wing(found) in MAY_IMPORT[wing(name)], f"{name}.py:{line}: {found}"


def test_no_two_modules_import_each_other():
    open_, done = [], set()

    def visit(name: str) -> None:
        assert name not in open_, " > ".join([*open_[open_.index(name) :], name])
        if name not in done:
            open_.append(name)
            for _, found in imports(name, at_import=True):
                if found in MODULES:
                    visit(found)
            done.add(open_.pop())

    for name in MODULES:
        visit(name)


@every_module
def test_only_the_edge_imports_ray(name):
    assert wing(name) in RAY_AT or not offenders(name, {"ray"})


def test_a_run_in_this_process_or_under_torchrun_waits_for_no_ray():
    read, unread = set(), ["launch"]
    while unread:
        read.add(name := unread.pop())
        found = {module for _, module in imports(name, at_import=True)}
        assert not any(module.split(".")[0] == "ray" for module in found), f"launch imports {name}, which imports Ray"
        unread += found & MODULES.keys() - read


@every_module
def test_nothing_imports_the_tasks(name):
    for line, found in imports(name):
        assert not found.startswith("tasks"), f"{name}.py:{line}: tasks arrive by dotted path"


@pytest.mark.parametrize("name", [name for name in MODULES if name in WITHOUT_TORCH or wing(name) in WITHOUT_TORCH])
def test_what_a_command_reads_first_does_without_torch(name):
    found = [import_ for import_ in imports(name, at_import=True) if import_[1].split(".")[0] in ("torch", "numpy")]
    assert name in NEEDS_TORCH or not found, (name, found)


def test_wings_have_nothing_in_their_init():
    assert [path for path in PACKAGE.glob("*/__init__.py") if path.parent.name != "tasks" and path.read_text()] == []


# Lines below the docstring. The loop is read in one screen, or it is not read.
LOOP = {"train_model": 15, "train_one_epoch": 10, "train_step": 15}


def test_the_loop_is_three_functions_on_one_screen():
    functions = {node.name: node for node in tree("training/loop").body if isinstance(node, ast.FunctionDef)}
    assert functions.keys() == LOOP.keys()
    for name, node in functions.items():
        docstring = node.body[0]
        assert (node.end_lineno or 0) - (docstring.end_lineno or 0) <= LOOP[name], name


def test_the_loop_draws_no_bar_opens_no_file_and_prints_nothing():
    loop = "training/loop"
    assert not offenders(loop, {"ray", "tqdm", "rich", "tensorboardX", "pathlib", "os", "logging"})
    calls = [node.func.id for node in ast.walk(tree(loop)) if isinstance(node, ast.Call) and hasattr(node.func, "id")]
    assert not {"open", "print", "input"} & set(calls)


# The last two: what a command imports before its cluster starts, which then does so while torch is imported.
@pytest.mark.parametrize(
    "name",
    ["raytrain", "raytrain.cli", "raytrain.config.load", "raytrain.training.signals", "raytrain.cluster.cluster"],
)
def test_help_bad_configs_and_the_start_of_a_cluster_need_not_wait_for_torch_or_ray(name):
    heavy = ("torch", "ray", "pandas", "pyarrow", "tensorboardX", "sklearn")
    code = f"import sys, {name}; print([heavy for heavy in {heavy} if heavy in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def table() -> str:
    used = Counter((wing(name), wing(found)) for name in MODULES for _, found in imports(name) if found in MODULES)
    lines = [f"{len(MODULES)} modules, {sum(n for (a, b), n in used.items() if a != b)} imports between wings"]
    for name, below in MAY_IMPORT.items():
        seen = [f"{other} {used[name, other]}" for other in MAY_IMPORT if used[name, other] and other != name]
        lines.append(f"{name:9} {sum(wing(module) == name for module in MODULES):3} modules")
        lines.append(f"          may import  {', '.join(below) or 'nothing'}")
        lines.append(f"          imports     {', '.join(seen) or 'nothing'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
