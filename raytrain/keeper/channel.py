"""The talk between a worker and the keeper of its host: a socket in the kernel's own namespace, for one user."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

from raytrain.errors import PreflightError
from raytrain.storage.processes import closed_in_forks, is_stopped

ANSWER_S = 5.0


class Channel:
    """One end of the talk between a worker and the keeper: dicts as JSON, and file descriptors."""

    def __init__(self, sock: socket.socket) -> None:
        self.peer, _ = peer_of(sock)
        self._connection = Connection(sock.detach())
        closed_in_forks(self._connection)

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, **message: Any) -> None:
        """OSError if the other end is gone."""
        self._connection.send_bytes(json.dumps(message).encode())

    def receive(self) -> dict[str, Any]:
        """The next message; EOFError or OSError if the other end is gone."""
        message: dict[str, Any] = json.loads(self._connection.recv_bytes())
        return message

    def receive_within(self, timeout_s: float) -> dict[str, Any]:
        """As `receive`, of a keeper; PreflightError if it is stopped, or says nothing for so long."""
        until = time.monotonic() + timeout_s
        while not self.poll(min(ANSWER_S, timeout_s)):
            stopped = is_stopped(self.peer)
            if stopped or time.monotonic() > until:
                why = "is stopped (SIGSTOP)" if stopped else f"has not answered for {timeout_s:g} s"
                raise PreflightError(
                    f"process {self.peer}, the keeper of this run's newest state, {why}. `kill -CONT {self.peer}` "
                    f"lets it go on, and save that; `kill -9 {self.peer}` gives up what is in no checkpoint. "
                    "Then run the same command again"
                )
        return self.receive()

    def poll(self, timeout_s: float = 0.0) -> bool:
        """Whether a message, or the end, is there."""
        return self._connection.poll(timeout_s)

    def send_descriptor(self, descriptor: int) -> None:
        reduction.send_handle(self._connection, descriptor, None)

    def receive_descriptor(self) -> int:
        return int(reduction.recv_handle(self._connection))

    def close(self) -> None:
        self._connection.close()


def is_own(sock: socket.socket) -> bool:
    """Whether the process at the other end is this user's."""
    return peer_of(sock)[1] == os.getuid()


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end; of a keeper, the process that called listen last."""
    pid, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, user
