"""What is no Ray head is refused at once, with what to do; what is one is accepted."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raytrain.cluster.address import check_address
from raytrain.errors import PreflightError


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
