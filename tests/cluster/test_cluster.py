"""The cluster under a run: what it can hold, what is left of it, and the mailbox between driver and workers."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytrain.cluster import cluster, local_cluster, resources
from raytrain.cluster.address import check_address
from raytrain.cluster.mailbox import Mailbox
from raytrain.errors import PreflightError


def scale(**changes: Any) -> SimpleNamespace:
    defaults = {"NUM_WORKERS": None, "USE_GPU": "auto", "CPUS_PER_WORKER": 1.0, "GPUS_PER_WORKER": 1.0, "RESOURCES": {}}
    return SimpleNamespace(**{**defaults, **changes})


# Without a cluster


@pytest.mark.parametrize(("cpus_per_worker", "num_cpus"), [(0.01, None), (1.0, 10_000)])
def test_more_workers_than_cores_do_not_wait_for_processes_that_never_start(
    cpus_per_worker: float, num_cpus: int | None
) -> None:
    """Four workers of half a CPU on two cores took 54 s to the first step, not 12: Ray started but two ahead."""
    cores = len(os.sched_getaffinity(0))
    asked = scale(NUM_WORKERS=2 * cores, CPUS_PER_WORKER=cpus_per_worker)
    assert cluster.prestart_for(asked, num_cpus).count == cores


def test_a_worker_reserves_what_scale_says() -> None:
    assert resources.resources_per_worker(scale(), False) == {"CPU": 1.0}
    asked = scale(CPUS_PER_WORKER=0.5, GPUS_PER_WORKER=2.0, RESOURCES={"fast_disk": 1.0})
    assert resources.resources_per_worker(asked, True) == {"CPU": 0.5, "GPU": 2.0, "fast_disk": 1.0}


@pytest.mark.parametrize(
    ("has", "needs", "fits"),
    [
        ({"CPU": 8.0}, {"CPU": 1.0}, 8),
        ({"CPU": 8.0}, {"CPU": 3.0}, 2),
        ({"CPU": 1.0}, {"CPU": 0.1}, 10),  # 1 / 0.1 is 9.99... in floating point
        ({"CPU": 8.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 0.5}, 2),
        ({"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}, 0),
        ({"CPU": 8.0}, {"CPU": 1.0, "fast_disk": 0.0}, 8),
    ],
)
def test_how_many_workers_fit(has: dict[str, float], needs: dict[str, float], fits: int) -> None:
    assert resources.count_fitting(has, needs) == fits


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


def test_ray_client_is_refused_with_the_command_that_works() -> None:
    with pytest.raises(PreflightError, match=r"--address ray://head:10001: .*ray job submit .*HEAD:6379"):
        check_address("ray://head:10001")


@pytest.mark.parametrize("address", ["cluster", "head:", ":6379", "head:0", "head:65536", "head:ssh", ""])
def test_what_is_no_address_is_refused_with_the_form_of_one(address: str) -> None:
    with pytest.raises(PreflightError, match=r"this is no address of a Ray head; write HOST:PORT, or auto"):
        check_address(address)


def test_an_address_at_which_nothing_listens_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(PreflightError, match=rf"127.0.0.1:{port}: no Ray cluster answers there .*`ray start --head`"):
        check_address(f"127.0.0.1:{port}")


def test_an_address_that_is_silent_is_refused_at_its_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(PreflightError, match=r"no Ray cluster answers there \(timed out\)"):
            check_address(address, timeout_s=0.1)


def test_another_programs_address_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        checked = pool.submit(check_address, address)
        connection, _ = server.accept()
        with connection:
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 505 HTTP Version Not Supported\r\n\r\n")
            with pytest.raises(PreflightError, match="what answers there is no Ray head"):
                checked.result()


# With one of 8 CPUs


@pytest.mark.ray
def test_the_address_of_a_cluster_is_accepted(ray_address: str) -> None:
    check_address(ray_address)


@pytest.mark.ray
def test_a_cluster_that_wants_a_token_gets_this_users_or_says_where_to_put_one(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(PreflightError, match=r"that cluster wants a token, and there is none here. Copy the head's"):
        check_address(ray_address)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("not looked at here")
    check_address(ray_address)
    assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.ray
def test_what_the_cluster_can_never_hold_is_an_error_in_place_of_a_wait_without_end(ray_address: str) -> None:
    resources.check_resources(8, {"CPU": 1.0})
    with pytest.raises(PreflightError) as raised:
        resources.check_resources(9, {"CPU": 1.0})
    assert str(raised.value).split("\n") == [
        "this cluster of 1 node can never hold 9 workers, only 8:",
        "  CPU: 9 wanted (9 x 1), the cluster has 8",
        "What to do: use fewer workers (--num_workers), or less each (--set SCALE.CPUS_PER_WORKER 0.5)",
    ]


@pytest.mark.ray
def test_resources_that_do_not_divide_the_nodes_are_counted_by_node(ray_address: str) -> None:
    resources.check_resources(2, {"CPU": 3.0})
    with pytest.raises(PreflightError, match="never hold 3 workers, only 2"):
        resources.check_resources(3, {"CPU": 2.9})


@pytest.mark.ray
def test_gpus_that_are_not_there_and_custom_resources_are_named(ray_address: str) -> None:
    with pytest.raises(PreflightError, match=r"GPU: 2 wanted \(2 x 1\), the cluster has 0\n.*--no_gpu"):
        resources.check_resources(2, {"CPU": 1.0, "GPU": 1.0})
    with pytest.raises(PreflightError, match=r"fast_disk: 1 wanted \(1 x 1\), the cluster has 0"):
        resources.check_resources(1, {"CPU": 1.0, "fast_disk": 1.0})


@pytest.mark.ray
def test_what_scale_leaves_open_is_read_off_the_cluster(ray_address: str) -> None:
    assert resources.resolve_workers(scale()) == (1, False)
    assert resources.resolve_workers(scale(NUM_WORKERS=3)) == (3, False)
    assert resources.resolve_workers(scale(NUM_WORKERS=2, USE_GPU=True)) == (2, True)
    assert resources.resolve_workers(scale(USE_GPU=False)) == (1, False)


@pytest.mark.ray
def test_a_connected_process_uses_its_cluster_and_leaves_it_standing(ray_address: str) -> None:
    import ray

    with cluster.starting(None) as joined:
        joined.connect()
        assert ray.get_runtime_context().gcs_address == ray_address
    assert ray.is_initialized()
    with cluster.starting(ray_address) as joined, pytest.raises(PreflightError, match="already connected to Ray"):
        joined.connect()


@pytest.mark.ray
def test_the_run_folder_is_reachable_where_all_is_one_machine(ray_address: str, tmp_path: Path) -> None:
    resources.check_reachable(str(tmp_path))
    resources.check_reachable("s3://bucket/run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_a_run_that_waits_says_for_what(ray_address: str) -> None:
    assert resources.free_workers({"CPU": 2.0}) == 4
    assert resources.wait_reason({"CPU": 2.0}, 6) == "the cluster has no room yet: CPU 12 (8 free)"


@pytest.fixture
def mailbox(ray_address: str) -> Iterator[Mailbox]:
    box = Mailbox("launch-a")
    yield box
    box.clear()


@pytest.mark.ray
def test_what_is_put_into_a_mailbox_comes_out_until_it_is_cleared(mailbox: Mailbox) -> None:
    assert mailbox.get("records") is None and mailbox.keys("") == []
    mailbox.put("records", [{"step": 1, "loss": 0.5, "note": "ä"}])
    mailbox.put("records", [{"step": 2, "loss": None, "note": "ä"}])  # the newest counts
    mailbox.put("failure-0", {"rank": 0})
    mailbox.put("failure-1", {"rank": 1})
    assert mailbox.get("records") == [{"step": 2, "loss": None, "note": "ä"}]
    assert mailbox.keys("failure-") == ["failure-0", "failure-1"]
    mailbox.clear()
    assert mailbox.get("records") is None and mailbox.keys("") == []


@pytest.mark.ray
def test_launches_do_not_read_each_others_mail(mailbox: Mailbox) -> None:
    other = Mailbox("launch-b")
    mailbox.put("stop", "signal to the driver")
    assert other.get("stop") is None
    other.clear()
    assert mailbox.get("stop") == "signal to the driver"


@pytest.mark.ray
def test_mail_arrives_in_other_processes(mailbox: Mailbox) -> None:
    import ray

    mailbox.put("stop", "please")

    def answer() -> str:
        box = Mailbox("launch-a")
        box.put("heard", f"{box.get('stop')}, yes")
        return "done"

    remote: Any = ray.remote(num_cpus=0)(answer)
    assert ray.get(remote.remote()) == "done"
    assert mailbox.get("heard") == "please, yes"
