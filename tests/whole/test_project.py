"""The files around the package: each does what its first comment says."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def own_files() -> list[Path]:
    """Every file that git tracks or would track."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        found = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, so nobody knows which files are the project's")
    return [ROOT / name for name in found.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def requirements(lines: list[str]) -> list[Requirement]:
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def declared() -> list[Requirement]:
    """What pyproject.toml asks for, extras too. (Python 3.10 has no tomllib.)"""
    text = (ROOT / "pyproject.toml").read_text()
    section = text[text.index("dependencies = [") : text.index("[project.scripts]")]
    names = re.findall(r'"([^"]+)"', re.sub(r"#.*", "", section))
    return requirements(names)


def pinned() -> dict[str, Requirement]:
    pins = requirements((ROOT / "constraints.txt").read_text().splitlines())
    return {canonicalize_name(pin.name): pin for pin in pins}


def dry_run(target: str, venv: Path) -> str:
    """The commands that `make target` would run on a machine without the venv."""
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", target, f"VENV={venv}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_every_dependency_is_pinned_to_a_version_that_the_package_accepts():
    pins = pinned()
    for wanted in declared():
        pin = pins[canonicalize_name(wanted.name)]
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert wanted.specifier.contains(exact.version), f"{wanted} does not admit {pin}"


def test_torch_is_installed_first_and_by_its_pin(tmp_path):
    assert str(pinned()["torch"].specifier) == "==2.13.0"
    installs = [line for line in dry_run("setup", tmp_path / "venv").splitlines() if "pip install" in line]
    assert installs[0].endswith("--constraint constraints.txt torch==2.13.0")
    assert all("--constraint constraints.txt" in line for line in installs)


def test_make_train_sets_up_and_trains_the_detector(tmp_path):
    commands = dry_run("train", tmp_path / "venv").splitlines()
    assert any("-m venv" in line for line in commands)
    assert commands[-1].rstrip().endswith("raytrain train --cfg_file configs/pointpillars_sim.yaml")


def test_make_test_sets_up_lints_checks_types_and_tests(tmp_path):
    commands = dry_run("test", tmp_path / "venv")
    order = [
        commands.index(step) for step in ("-m venv", "ruff check", "ruff format --check", "bin/mypy", "bin/pytest")
    ]
    assert order == sorted(order)


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("\nexec make test")
    subprocess.run(["bash", "-n", script], check=True)


def test_ray_accepts_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    (node_type,) = config["available_node_types"].values()
    assert node_type["min_workers"] == len(config["provider"]["worker_ips"])


def test_the_cluster_file_has_three_lines_to_edit_and_starts_ray_with_a_token():
    text = (ROOT / "cluster.yaml").read_text()
    assert len(re.findall("# EDIT", text)) == 3
    config = yaml.safe_load(text)
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)


def test_configs_open_with_what_they_train_on_what_for_how_long_and_the_score():
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        head = path.read_text().split("\n\n")[0]
        for word in ("# Trains:", "# On:", "# For:", "# Score:"):
            assert word in head, f"{path.name} does not open with a line {word}"


def test_no_file_names_a_place_on_one_machine_or_a_package_index():
    # Written in pieces: this file is searched too.
    pieces = [
        ("/wo", "rk/"),
        ("/opt/", "rt"),
        ("/ro", "ot/"),
        ("pypi", ".org"),
        ("python", "hosted"),
        ("index", "-url"),
    ]
    forbidden = re.compile("|".join(re.escape(first + second) for first, second in pieces))
    found = []
    for path in own_files():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue  # a binary file
        found += [
            f"{path.relative_to(ROOT)}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if forbidden.search(line)
        ]
    assert not found, "\n".join(found)
