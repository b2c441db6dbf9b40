"""A cluster that a run starts for itself: Ray Train without its helpers restarts, explains and cleans up too."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, SUPPORT, family, gone
from runs import Run

from raytrain.cluster.address import ask_head

pytestmark = pytest.mark.ray


def test_it_listens_on_loopback_only_wants_a_token_and_says_in_one_screen_that_a_worker_was_killed(
    tmp_path: Path,
) -> None:
    """That it goes with a driver that is killed is shown in test_killed_runs_leave_nothing."""
    run = Run(tmp_path, {"SCALE.MAX_FAILURES": 0})
    run.hold(9)
    launched = run.start("--num_workers", "2", env={"RAY_ADDRESS": ""})
    pids = run.held(2, launched)
    everyone = set(family(launched.pid))
    sockets = {pid: listening(pid) for pid in everyone}
    head = next(pid for pid in everyone if "gcs_server" in command_of(pid))
    answers = [ask_head("127.0.0.1", port, 5.0) for _, port in sockets[head]]
    first = int((run.run_dir / ".lock").read_text().split()[1])
    os.kill(next(pid for pid in pids if pid != first), signal.SIGKILL)
    run.release()
    said = launched.ended(1)
    gone(everyone)
    assert [pid for pid in sockets if sockets[pid]], "none listens: this looks at the wrong processes"
    heard = [f"{command_of(pid)} {where}" for pid in sockets for where in sockets[pid] if not where[0].is_loopback]
    assert heard == []
    assert answers == ["refused"]
    assert said.count("failed on rank 1") == 1 and "died without a word" in said and "Traceback" not in said
    assert "(raylet)" not in said
    *_, failure = run.records("event")
    assert failure["event"] == "failure" and failure["message"] in said


def listening(pid: int) -> list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    """(address, port) of each socket on which a process takes connections."""
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    waiting = {row[9]: row[1] for row in rows if row[3] == "0A"}
    with contextlib.suppress(OSError):  # one that ends meanwhile
        links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
        inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
        return [address_of(waiting[inode]) for inode in sorted(inodes & waiting.keys())]
    return []


def address_of(text: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    """`0100007F:1F90` of /proc/net/tcp: words of four bytes in the machine's order, and a port."""
    address, _, port = text.partition(":")
    words = [
        bytes.fromhex(address[i : i + 8])[:: -1 if sys.byteorder == "little" else 1] for i in range(0, len(address), 8)
    ]
    found = ipaddress.ip_address(b"".join(words))
    return getattr(found, "ipv4_mapped", None) or found, int(port, 16)


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode()
    except OSError:
        return ""


def test_what_a_run_is_refused_for_is_said_and_its_cluster_ended(tmp_path: Path) -> None:
    launched = Run(tmp_path).start("--num_workers", "2", "--resume", "nowhere", env={"RAY_ADDRESS": ""})
    said = launched.ended(2)
    assert said.startswith("raytrain: ") and "nowhere" in said and said.count("\n") == 1
    assert not list(Path("/tmp").glob(f"raytrain-ray-{launched.pid}-*"))


def test_ray_keeps_its_own_way_where_its_version_is_not_known(tmp_path: Path) -> None:
    code = (
        "from raytrain.cluster import local_cluster; local_cluster.TESTED = ();"
        "from raytrain.cli import main; exit(main())"
    )
    words = [sys.executable, "-c", code, *Run(tmp_path).words("--num_workers", "2")]
    env = {**os.environ, "PYTHONPATH": f"{SUPPORT}{os.pathsep}{ROOT}"}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0 and "finished after epoch 3" in done.stdout, done.stdout + done.stderr
