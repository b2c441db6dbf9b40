"""Design decisions that a machine can check: imports point down, and Ray stays at the edge."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "raytrain"

# A module may import those above it. A new module needs a place here.
ORDER = [
    "errors",
    "failure",
    "cluster/budget",
    "progress",
    "keeper/shared_memory",
    "keeper/heartbeat",
    "config/yaml_tree",
    "config/schema",
    "config/overrides",
    "config/tree",
    "config/distributions",
    "config/sweep",
    "config/load",
    "config/phases",
    "sweep/space",
    "sweep/search",
    "engine/randomness",
    "data/sampler",
    "engine/schedule",
    "engine/optim",
    "engine/clip",
    "engine/per_parameter",
    "engine/flat",
    "engine/precision",
    "engine/sync_bn",
    "storage/direct_io",
    "storage/retry",
    "storage/storage",
    "storage/checkpoint",
    "storage/state_file",
    "storage/store",
    "journal/records",
    "journal/journal",
    "journal/run_folder",
    "keeper/watchdog",
    "keeper/keeper",
    "sweep/ledger",
    "journal/display",
    "task",
    "engine/world",
    "training/pictures",
    "data/transfer",
    "data/feed",
    "engine/buffers",
    "engine/guard",
    "engine/reduction",
    "engine/overlap",
    "engine/engine",
    "engine/compilation",
    "engine/state",
    "keeper/snapshots",
    "keeper/checkpointer",
    "training/bad_steps",
    "training/loop",
    "training/resume",
    "training/checkpoints",
    "sweep/advice",
    "sweep/display",
    "sweep/report",
    "training/signals",
    "cluster/local_cluster",
    "cluster/cluster",
    "training/control",
    "sweep/datasets",
    "training/worker",
    "cluster/prestart",
    "training/preflight",
    "cluster/controller",
    "cluster/rendezvous",
    "cluster/driver",
    "launch",
    "torchrun",
    "training/evaluate",
    "sweep/lineage",
    "sweep/preflight",
    "sweep/sweep",
    "sweep/schedulers",
    "sweep/trial",
    "sweep/prestart",
    "sweep/tune",
    "cli",
    "__main__",
]
RAY_AT = {
    *(
        "cluster/local_cluster",
        "cluster/cluster",
        "training/control",
        "training/worker",
        "cluster/prestart",
        "cluster/controller",
        "cluster/rendezvous",
        "cluster/driver",
        "launch",
    ),
    *("sweep/schedulers", "sweep/trial", "sweep/prestart", "sweep/tune"),
}
CONFIG = {"config/yaml_tree", "config/schema", "config/overrides", "config/tree", "config/sweep", "config/load"}
STORED = {
    "storage/direct_io",
    "storage/retry",
    "storage/storage",
    "storage/checkpoint",
    "storage/store",
    "keeper/shared_memory",
    "keeper/heartbeat",
    "keeper/watchdog",
    "keeper/keeper",
}
WITHOUT_TORCH = {
    *CONFIG,
    *STORED,
    "errors",
    "failure",
    "cluster/budget",
    "progress",
    "engine/schedule",
    "journal/records",
    "journal/display",
    "sweep/ledger",
    "sweep/advice",
    "sweep/display",
    "training/checkpoints",
}
FROM_THE_START = {
    "errors",
    "progress",
    "config/load",
    "task",
    "training/loop",
    "training/worker",
    "launch",
    "cluster/cluster",
    "cli",
}

MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__" and "tasks" not in path.parts
}
every_module = pytest.mark.parametrize("name", list(MODULES))


def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text())


def imports(name: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import in a module, those inside functions too.

    `from raytrain.training.loop import x` gives raytrain.training.loop; `from raytrain import loop` gives it too.
    """
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}.py:{node.lineno}: write imports in full, not relative"
            package = str(node.module).replace(".", "/").removeprefix("raytrain").removeprefix("/")
            if str(node.module).startswith("raytrain") and package not in MODULES:
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, str(node.module)


def offenders(name: str, packages: set[str]) -> list[str]:
    return [f"{name}.py:{line}: {found}" for line, found in imports(name) if found.split(".")[0] in packages]


def test_the_modules_of_the_design_exist_and_each_has_its_place():
    assert set(MODULES) >= FROM_THE_START
    assert not set(MODULES) - set(ORDER), "say in ORDER what these may import"


@every_module
def test_imports_point_down(name):
    below = ORDER[: ORDER.index(name)]
    for line, found in imports(name):
        package, _, target = found.partition(".")
        target = target.replace(".", "/")
        if package == "raytrain" and target not in ("", "__version__"):
            assert target in below, f"{name}.py:{line} imports {found}, which is not below it"


@every_module
def test_only_the_edge_imports_ray(name):
    assert name in RAY_AT or not offenders(name, {"ray"})


@every_module
def test_nothing_imports_the_tasks(name):
    for line, found in imports(name):
        assert not found.startswith("raytrain.tasks"), f"{name}.py:{line}: tasks arrive by dotted path"


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_pure_modules_do_without_torch(name):
    assert not offenders(name, {"torch", "numpy"})


def test_the_loop_draws_no_bar_opens_no_file_and_prints_nothing():
    assert not offenders("training/loop", {"ray", "tqdm", "rich", "tensorboardX", "pathlib", "os", "logging"})
    calls = [
        node.func.id
        for node in ast.walk(tree("training/loop"))
        if isinstance(node, ast.Call) and hasattr(node.func, "id")
    ]
    assert not {"open", "print", "input"} & set(calls)


@pytest.mark.parametrize("name", ["raytrain", "raytrain.cli", "raytrain.config.load"])
def test_help_and_bad_configs_need_not_wait_for_torch_or_ray(name):
    heavy = ("torch", "ray", "pandas", "pyarrow", "tensorboardX", "sklearn")
    code = f"import sys, {name}; print([heavy for heavy in {heavy} if heavy in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
