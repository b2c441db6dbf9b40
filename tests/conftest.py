"""What tests share: one Ray cluster a session, a small task, and commands as a user runs them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Pair

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a cluster of 8 CPUs (said, not had); this process is connected to it."""
    import ray

    from raytrain import cluster

    with cluster.connected(None, num_cpus=8):
        yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes joined by gloo."""
    with contextlib.closing(Pair(tmp_path_factory.mktemp("pair") / "meeting")) as processes:
        yield processes


@pytest.fixture
def raytrain_command() -> list[str]:
    """The command line as a user types it, of the environment under test."""
    return [sys.executable, "-m", "raytrain"]


def run_command(words: list[str], cwd: Path, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """The finished process, with its output as text."""
    env = {**os.environ, "PYTHONPATH": str(cwd), "COLUMNS": "200"}
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
