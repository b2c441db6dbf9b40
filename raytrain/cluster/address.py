"""The address of a cluster that stands: whether a Ray head answers there, and how to join it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import Iterable
from pathlib import Path

from raytrain.cluster import token
from raytrain.cluster.local_cluster import TEMP_PREFIX, first_line, is_tested, on_loopback, silence_raylets
from raytrain.errors import PreflightError
from raytrain.storage.processes import commands

ANSWER_S = 5.0  # a Ray head that has not answered by then is not there
OWN = "local"  # an address that asks for a cluster of the run's own


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a cluster is that is to be joined, and who says so: the command, or RAY_ADDRESS.

    Ray sets that in every `ray job submit` job; and joins there, as its Train and Tune do.
    """

    where: str
    is_given: bool = True

    def __str__(self) -> str:
        return f"--address {self.where}" if self.is_given else f"RAY_ADDRESS={self.where}"

    @property
    def way_out(self) -> str:
        return "leave --address out" if self.is_given else f"say --address {OWN}"


def address_of(given: str | None) -> Address | None:
    """The cluster to join: the one that is given, or the one that RAY_ADDRESS names; None for one of the run's own."""
    where = os.environ.get("RAY_ADDRESS") or OWN if given is None else given
    return None if where == OWN else Address(where, given is not None)


def join(address: Address) -> None:
    """Connect to the cluster at `address`, or a PreflightError that says why not."""
    import ray

    if is_tested():
        silence_raylets()
    try:
        with on_loopback() if is_on_loopback_only(address.where) else contextlib.nullcontext():
            ray.init(address=address.where, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise PreflightError(
            f"{address}: no Ray cluster answers there ({first_line(error)}). Start one with "
            f"`ray start --head`, or {address.way_out} to use this machine alone"
        ) from error


def is_on_loopback_only(address: str) -> bool:
    """Whether a head answers at 127.0.0.1 alone: Ray would try this machine's other address in its place."""
    import ray

    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdecimal():
        return False
    try:
        socket.create_connection((ray.util.get_node_ip_address(), int(port)), timeout=ANSWER_S).close()
    except OSError:
        return True
    return False


def meant_by(address: Address) -> Address:
    """With HOST:PORT of the cluster that `auto` means: RAY_ADDRESS, else the one that runs on this machine.

    None that another run has started for itself: that would end under this one.
    """
    if address.where != "auto" or not Path("/proc/self").exists():
        return address
    named = os.environ.get("RAY_ADDRESS", "auto")
    where = named if named not in ("", "auto", OWN) else head_among(commands(), address)
    return dataclasses.replace(address, where=where)


def head_among(processes: Iterable[list[str]], address: Address) -> str:
    """HOST:PORT of the one cluster that has nodes among these processes, each told by its words."""
    raylets = [command for command in processes if Path(command[0]).name == "raylet"]
    private = [command for command in raylets if any(f"/{TEMP_PREFIX}" in word for word in command)]
    heads = {word.partition("=")[2] for raylet in raylets if raylet not in private for word in raylet if is_head(word)}
    if len(heads) == 1:
        return heads.pop()
    if heads:
        raise PreflightError(
            f"{address}: {len(heads)} Ray clusters run on this machine ({', '.join(sorted(heads))}); give one"
        )
    others = f", only {len(private)} that other runs have for themselves" if private else ""
    raise PreflightError(
        f"{address}: no Ray cluster runs on this machine{others}. Start one with `ray start --head`, or "
        f"{address.way_out} to use this machine alone"
    )


def is_head(word: str) -> bool:
    """Whether this word of a raylet's command names the head of its cluster."""
    return word.startswith("--gcs-address=") and ":" in word


def check_address(address: Address, timeout_s: float = ANSWER_S) -> None:
    """PreflightError unless a Ray head answers at `address`: ray.init would try for minutes, and print of it."""
    where = address.where
    if where.startswith("ray://"):
        raise PreflightError(
            f"{address}: training does not run through Ray Client; start it on the cluster with `ray job submit "
            f"--address http://HEAD:8265 -- raytrain train ...`, or give HEAD:6379, or {address.way_out} to train here"
        )
    if where.startswith(("http://", "https://")):
        raise PreflightError(
            f"{address}: that takes jobs, `ray job submit --address {where} -- raytrain train ...` trains there; "
            f"or {address.way_out} to train here"
        )
    if where == "auto":
        return  # without /proc; Ray looks for one on this machine, and says at once if there is none
    host, _, port = where.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise PreflightError(f"{address}: this is no address of a Ray head; write HOST:PORT, auto, or {OWN} for none")
    fix = f"Start one with `ray start --head`, or {address.way_out} to use this machine alone"
    if os.environ.get("RAY_USE_TLS", "0") in ("1", "true"):
        return
    try:
        answer = ask_head(host.strip("[]"), int(port), timeout_s)
    except OSError as error:
        raise PreflightError(f"{address}: no Ray cluster answers there ({error.strerror or error}). {fix}") from error
    if answer is None:
        raise PreflightError(f"{address}: what answers there is no Ray head. {fix}")
    if answer == "refused" and os.environ.get("RAY_AUTH_MODE") is None:
        take_token(address)


def take_token(address: Address) -> None:
    """The cluster wants a token: Ray sends this user's if it is told to, before it is imported."""
    if not token.is_at_hand():
        raise PreflightError(
            f"{address}: that cluster wants a token, and there is none here. Copy the head's "
            "~/.ray/auth_token to the same place on this machine, or set RAY_AUTH_TOKEN"
        )
    os.environ["RAY_AUTH_MODE"] = "token"


def ask_head(host: str, port: int, timeout_s: float) -> str | None:
    """What a Ray head answers to one call without a token: "open" or "refused"; None from what is no Ray head.

    A call of gRPC by hand (RFC 9113, RFC 7541): Ray's own client prints a line a second while it is refused.
    """

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode()

    def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    call = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/ray.rpc.NodeInfoGcsService/GetClusterId",
        ":authority": "head",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    headers = b"".join(b"\0" + text(name) + text(value) for name, value in call.items())
    data, headers_kind, settings = 0, 1, 4
    end_stream, end_headers = 1, 4
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(settings, 0, 0))
        connection.sendall(frame(headers_kind, end_headers, 1, headers) + frame(data, end_stream, 1, bytes(5)))
        stream = connection.makefile("rb")
        first = True
        while len(head := stream.read(9)) == 9:
            size, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
            if first and kind != settings:
                return None
            first = False
            stream.read(size)
            if kind == settings and not flags:
                connection.sendall(frame(settings, 1, 0))
            if kind == data and size:
                return "open"
            if kind == headers_kind and flags & end_stream:  # an error comes without data
                return "refused"
    return None
