"""What is left of a cluster of a run's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from raytrain.cluster import local_cluster


def test_what_killed_drivers_left_is_removed_and_what_living_ones_use_is_not() -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    folders = {
        pid: Path(tempfile.mkdtemp(prefix=f"{local_cluster.TEMP_PREFIX}{pid}-", dir="/tmp"))
        for pid in (int(done.stdout), os.getpid())
    }
    try:
        local_cluster.remove_stale_temp_dirs()
        assert [path.exists() for path in folders.values()] == [False, True]
    finally:
        for path in folders.values():
            shutil.rmtree(path, ignore_errors=True)
