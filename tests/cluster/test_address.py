"""What is no Ray head is refused at once, with what to do; what is one is accepted."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raytrain.cluster.address import Address, address_of, check_address, head_among, meant_by
from raytrain.cluster.local_cluster import TEMP_PREFIX
from raytrain.errors import PreflightError
from raytrain.storage.processes import commands


@pytest.mark.parametrize(
    ("given", "environment", "joined"),
    [
        (None, None, None),
        (None, "", None),
        (None, "local", None),
        (None, "head:6379", "RAY_ADDRESS=head:6379"),
        (None, "auto", "RAY_ADDRESS=auto"),
        ("local", "head:6379", None),
        ("other:6379", "head:6379", "--address other:6379"),
        ("auto", "head:6379", "--address auto"),
        ("other:6379", None, "--address other:6379"),
    ],
)
def test_the_cluster_that_ray_address_names_is_joined_unless_the_command_says_another(
    monkeypatch: pytest.MonkeyPatch, given: str | None, environment: str | None, joined: str | None
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", environment or "")
    if environment is None:
        monkeypatch.delenv("RAY_ADDRESS")
    address = address_of(given)
    assert (None if address is None else str(address)) == joined


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("ray://head:10001", "training does not run through Ray Client"),
        ("http://head:8265", "that takes jobs, `ray job submit --address http://head:8265 -- raytrain train"),
        ("cluster", "this is no address of a Ray head"),
        ("127.0.0.1:9", "no Ray cluster answers there"),
    ],
)
def test_a_ray_address_that_leads_nowhere_is_named_with_the_way_out(where: str, said: str) -> None:
    with pytest.raises(PreflightError) as refused:
        check_address(Address(where, is_given=False))
    assert str(refused.value).startswith(f"RAY_ADDRESS={where}: {said}")
    assert "--address local" in str(refused.value) or "local for none" in str(refused.value)
    assert "leave --address out" not in str(refused.value)


def test_ray_client_is_refused_with_the_command_that_works() -> None:
    with pytest.raises(PreflightError, match=r"--address ray://head:10001: .*ray job submit .*HEAD:6379"):
        check_address(Address("ray://head:10001"))


@pytest.mark.parametrize("address", ["cluster", "head:", ":6379", "head:0", "head:65536", "head:ssh", ""])
def test_what_is_no_address_is_refused_with_the_form_of_one(address: str) -> None:
    with pytest.raises(
        PreflightError, match=r"this is no address of a Ray head; write HOST:PORT, auto, or local for none"
    ):
        check_address(Address(address))


def test_an_address_at_which_nothing_listens_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(PreflightError, match=rf"127.0.0.1:{port}: no Ray cluster answers there .*`ray start --head`"):
        check_address(Address(f"127.0.0.1:{port}"))


def test_an_address_that_is_silent_is_refused_at_its_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(PreflightError, match=r"no Ray cluster answers there \(timed out\)"):
            check_address(Address(address), timeout_s=0.1)


def test_another_programs_address_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        checked = pool.submit(check_address, Address(address))
        connection, _ = server.accept()
        with connection:
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 505 HTTP Version Not Supported\r\n\r\n")
            with pytest.raises(PreflightError, match="what answers there is no Ray head"):
                checked.result()


def node(head: str, folder: str) -> list[str]:
    """The words of the process of a node, as Ray starts it."""
    return [f"{RAY}/raylet", "--raylet_socket_name=x", f"--gcs-address={head}", f"--session_dir={folder}/session_1"]


RAY = "/venv/ray/core/src/ray/raylet"
OWN = node("127.0.0.1:7001", f"/tmp/{TEMP_PREFIX}4711-abc")  # of a run that has started a cluster for itself
STARTED, OTHER = node("10.0.0.1:6379", "/tmp/ray"), node("10.0.0.2:6379", "/scratch/ray")
AUTO = Address("auto")
OTHERS = [["python", "-m", "raytrain", "--gcs-address=1.2.3.4:5"], ["grep", "raylet"], ["gcs_server", "--port=1"]]


@pytest.mark.parametrize(
    ("processes", "head"),
    [
        ([STARTED], "10.0.0.1:6379"),
        ([OTHER, *OTHERS], "10.0.0.2:6379"),
        ([STARTED, STARTED], "10.0.0.1:6379"),  # two nodes of one cluster
        ([OWN, STARTED, *OTHERS], "10.0.0.1:6379"),
        ([STARTED, OWN, OWN], "10.0.0.1:6379"),
        ([node("[fd00::1]:6379", "/tmp/ray"), OWN], "[fd00::1]:6379"),
    ],
)
def test_auto_is_the_cluster_that_runs_here_and_none_that_another_run_has_for_itself(
    processes: list[list[str]], head: str
) -> None:
    assert head_among(processes, AUTO) == head


@pytest.mark.parametrize(
    ("processes", "said"),
    [
        ([], r"no Ray cluster runs on this machine. Start one with `ray start --head`"),
        (OTHERS, r"no Ray cluster runs on this machine. Start one"),
        ([OWN], r"no Ray cluster runs on this machine, only 1 that other runs have for themselves. Start one"),
        ([OWN, OWN], r"no Ray cluster runs on this machine, only 2 that other runs have for themselves"),
        ([STARTED, OTHER], r"2 Ray clusters run on this machine \(10.0.0.1:6379, 10.0.0.2:6379\); give one"),
        ([STARTED, OTHER, OWN], r"2 Ray clusters run on this machine"),
    ],
)
def test_where_auto_means_none_or_several_it_says_what_there_is(processes: list[list[str]], said: str) -> None:
    with pytest.raises(PreflightError, match=f"--address auto: {said}"):
        head_among(processes, AUTO)


def test_auto_is_what_ray_address_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.3:6379")
    assert meant_by(AUTO) == Address("10.0.0.3:6379")
    assert meant_by(Address("10.0.0.4:6379")) == Address("10.0.0.4:6379")


@pytest.mark.ray
def test_the_address_of_a_cluster_is_accepted_but_auto_never_means_one_of_a_runs_own(
    ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_address(Address(ray_address))
    nodes = [command for command in commands() if f"--gcs-address={ray_address}" in command]
    assert "raylet" in {Path(command[0]).name for command in nodes}
    monkeypatch.setenv("RAY_ADDRESS", "")
    try:
        assert meant_by(AUTO).where != ray_address
    except PreflightError as error:
        assert "other runs have for themselves" in str(error) or "give one" in str(error)


@pytest.mark.ray
def test_a_cluster_that_wants_a_token_gets_this_users_or_says_where_to_put_one(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(PreflightError, match=r"that cluster wants a token, and there is none here. Copy the head's"):
        check_address(Address(ray_address))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("not looked at here")
    check_address(Address(ray_address))
    assert os.environ["RAY_AUTH_MODE"] == "token"
