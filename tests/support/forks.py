"""Commands as copies of a process that has imported torch already: each takes 2 s of CPU less to start.

Each is `python -m raytrain ...`, or torchrun, in all else: it leads a session, has its own folder, environment and
output, and ends as a process does. The order of Python's sets is the one that the command line gives itself.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

VARIABLE, FIXED = "PYTHONHASHSEED", "0"  # as in raytrain/hash_seed.py: the server imports that later
MESSAGE_BYTES = 1 << 20
# Not ray, which takes its settings from the environment as it is imported.
IMPORTED = (
    *("raytrain.cli", "raytrain.launch", "raytrain.training.worker", "raytrain.sweep.report", "pandas", "optuna"),
    "torch.distributed.run",
)


@functools.cache
def forks() -> Forks:
    """Those of this process; their server ends with it."""
    return Forks()


class Forks:
    """Has a server make such processes, which outlive it."""

    def __init__(self) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel = ours
        with its:
            command = [sys.executable, str(Path(__file__).absolute()), str(its.fileno())]
            server = subprocess.Popen(
                command, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, env={**os.environ, VARIABLE: FIXED}
            )
        atexit.register(server.wait)
        atexit.register(ours.close)  # which comes first

    def start(
        self, words: Sequence[str], folder: Path, env: Mapping[str, str], output: Path, errors: Path | None = None
    ) -> Fork:
        """`raytrain ...` or `torchrun ...`; what it prints goes to that file, and to `errors` what goes to stderr."""
        asked = {"words": list(words), "folder": str(folder), "env": dict(env)}
        asked |= {"output": str(output), "errors": str(errors or output)}
        status, write = os.pipe()
        try:
            socket.send_fds(self._channel, [json.dumps(asked).encode()], [write])
        finally:
            os.close(write)
        return Fork(int(self._channel.recv(MESSAGE_BYTES)), status)


class Fork:
    """One of them, as subprocess.Popen shows a process."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid, self._status = pid, status
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self.returncode = int(os.read(self._status, 16))  # of nothing, if the server is gone: a ValueError
            os.close(self._status)
        return self.returncode


def serve(channel: socket.socket) -> None:
    """Starts what it is asked to, and tells each one's end; returns when nobody is left to ask."""
    for name in IMPORTED:
        __import__(name)
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    running: dict[int, int] = {}
    while True:
        ready = select.select([channel, woken], [], [])[0]
        if woken in ready:
            os.read(woken, MESSAGE_BYTES)
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
                        os.write(running[pid], str(os.waitstatus_to_exitcode(status)).encode())
                    os.close(running.pop(pid))
        if channel in ready:
            message, pipes, *_ = socket.recv_fds(channel, MESSAGE_BYTES, 1)
            if not message:
                return
            [status_pipe] = pipes
            if (pid := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (channel.detach(), woken, wake, status_pipe, *running.values()):
                    os.close(each)
                become(**json.loads(message))
            running[pid] = status_pipe
            channel.send(str(pid).encode())


def become(words: list[str], folder: str, env: dict[str, str], output: str, errors: str) -> NoReturn:
    """This process goes on as that command."""
    os.setsid()
    for standard, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, standard)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update({**env, VARIABLE: FIXED})
    sys.path[0] = folder
    sys.path[1:1] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = words
    if words[0] == "torchrun":
        from torch.distributed import run

        run.main()
    else:
        runpy.run_module("raytrain", run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
