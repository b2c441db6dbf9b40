"""Where a cluster of a run's own has its files, and what is said where there is no place for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raytrain.cluster import local_cluster
from raytrain.cluster.local_cluster import LocalCluster, Prestart, cluster_folder
from raytrain.errors import PreflightError

MAKE = "from raytrain.cluster.local_cluster import cluster_folder; print(cluster_folder().path, flush=True); input()"


def test_what_killed_drivers_left_is_removed_and_what_living_ones_use_is_not() -> None:
    makers = [subprocess.Popen([sys.executable, "-c", MAKE], stdin=-1, stdout=-1, text=True) for _ in range(2)]
    folders = [Path(maker.stdout.readline().strip()) for maker in makers if maker.stdout]
    makers[0].kill()
    makers[0].communicate()
    own = cluster_folder()
    assert [path.exists() for path in (*folders, own.path)] == [False, True, True]
    own.remove()
    makers[1].communicate("\n")
    assert not any(path.exists() for path in (*folders, own.path))


def test_its_sockets_have_a_path_that_is_short_enough(tmp_path: Path) -> None:
    folder = cluster_folder()
    most = local_cluster.SOCKET_PATH_BYTES - local_cluster.SOCKET_BYTES
    assert len(str(folder.path)) <= most, folder.path
    folder.remove()


@pytest.mark.parametrize(("temp_dir", "goes"), [("short", True), ("missing", False), ("long" * 20, False), ("", False)])
def test_where_tmp_cannot_be_written_to_tmpdir_is_taken_if_it_is_short_enough(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, temp_dir: str, goes: bool
) -> None:
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")
    place = base / f"rt{temp_dir}" if temp_dir else None
    monkeypatch.setattr(local_cluster, "SHORT", str(tmp_path_factory.getbasetemp() / "no-tmp"))
    monkeypatch.setattr(local_cluster, "SOCKET_PATH_BYTES", 150)  # by itself that leaves 8 characters
    monkeypatch.delenv("TMPDIR", raising=False)
    if place is not None:
        monkeypatch.setenv("TMPDIR", str(place))
        if temp_dir != "missing":
            place.mkdir()
    try:
        if goes:
            folder = cluster_folder()
            assert folder.path.parent == place
            folder.remove()
        else:
            with pytest.raises(
                PreflightError, match=r"cannot be written to .* Set TMPDIR to a folder .*--num_workers 0"
            ):
                cluster_folder()
    finally:
        if place is not None and place.exists():
            place.rmdir()


def test_a_cluster_that_cannot_start_says_so_and_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_cluster, "SHORT", "/proc/no-tmp")
    monkeypatch.delenv("TMPDIR", raising=False)
    cluster = LocalCluster(1, False, Prestart())
    with pytest.raises(PreflightError, match="cannot be written to"):
        cluster.join()
    cluster.close()
