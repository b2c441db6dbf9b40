"""The undisturbed runs that disturbed ones are held against, each trained once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import Run

import raytrain
from raytrain.cli import main


@pytest.fixture(scope="session")
def undisturbed_here(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run in one process."""
    return trained(tmp_path_factory.mktemp("undisturbed"), 0)


@pytest.fixture(scope="session")
def undisturbed_on_two(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Run:
    """A whole run on two Ray workers."""
    return trained(tmp_path_factory.mktemp("undisturbed"), 2)


@pytest.fixture(scope="session")
def failed_on_two(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Run:
    """A run on two workers that failed in its 10th step, in mid-epoch, after checkpoint_step_8; copy it to go on."""
    run = Run(tmp_path_factory.mktemp("failed"))
    (run.gate / "fail").write_text("9")
    assert main(run.words("--num_workers", "2")) == 1
    (run.gate / "fail").unlink()
    assert run.names()[-1] == "checkpoint_step_8"
    return run


def trained(folder: Path, num_workers: int) -> Run:
    run = Run(folder)
    cfg = raytrain.load_config(run.config_file, ["OUTPUT", str(folder / "output")])
    assert raytrain.train(cfg, num_workers=num_workers, quiet=True).status == "finished"
    return run
