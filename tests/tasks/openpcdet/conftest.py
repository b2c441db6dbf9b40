"""A folder that looks like a checkout of OpenPCDet, with data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

LIKE = Path(__file__).parents[2] / "support" / "pcdet_like"


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One a process, since pcdet is imported from it."""
    folder = tmp_path_factory.mktemp("like") / "OpenPCDet"
    shutil.copytree(LIKE, folder)
    (folder / "data" / "dots").mkdir(parents=True)
    return folder
