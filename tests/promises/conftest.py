"""The undisturbed runs that disturbed ones are held against, each trained once a session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from runs import Run

import raytrain
from raytrain.cli import main

if TYPE_CHECKING:
    from sweeps import Undisturbed


@pytest.fixture(scope="session")
def undisturbed_here(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run in one process."""
    run = Run(tmp_path_factory.mktemp("undisturbed"))
    cfg = raytrain.load_config(run.config_file, ["OUTPUT", str(run.folder / "output")])
    assert raytrain.train(cfg, num_workers=0, quiet=True).status == "finished"
    return run


@pytest.fixture(scope="session")
def failed_here(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in one process that failed in its 15th step, in mid-epoch, after checkpoint_step_12; copy it to go on."""
    run = Run(tmp_path_factory.mktemp("failed"))
    (run.gate / "fail").write_text("14")
    assert main(run.words("--num_workers", "0")) == 1
    (run.gate / "fail").unlink()
    assert run.names()[-2:] == ["checkpoint_epoch_1", "checkpoint_step_12"]
    return run


@pytest.fixture(scope="session")
def undisturbed_on_two(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run on two Ray workers, on a cluster of its own: those start fastest."""
    run = Run(tmp_path_factory.mktemp("undisturbed"))
    run.run("--num_workers", "2")
    return run


@pytest.fixture(scope="session")
def failed_on_two(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on two workers that failed in its 10th step, in mid-epoch, after checkpoint_step_8; copy it to go on."""
    run = Run(tmp_path_factory.mktemp("failed"))
    (run.gate / "fail").write_text("9")
    run.run("--num_workers", "2", status=1)
    (run.gate / "fail").unlink()
    assert run.names()[-1] == "checkpoint_step_8"
    return run


@pytest.fixture(scope="session")
def undisturbed_sweep(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Undisturbed:
    """A finished sweep under a scheduler."""
    from sweeps import sweep, swept, under  # which import Ray Tune

    runs: dict[str, Run] = {}

    def of(scheduler: str) -> Run:
        if scheduler not in runs:
            runs[scheduler] = sweep(tmp_path_factory.mktemp(scheduler), under(scheduler))
            assert swept(runs[scheduler]).status == "finished"
        return runs[scheduler]

    return of
