"""Processes joined by gloo that run functions of the test modules, torch imported once a session; and keepers."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

DEADLINE_S = 60.0
# What calls need that these processes answer: each is a fork of one that has imported it.
IMPORTED = ["torch", "pytest", "raytrain.data.feed", "raytrain.engine.engine"]


def keepers_of(run_uri: str) -> list[int]:
    """Pids of the keepers of a run folder; not of a process that only starts one, and leads its session."""

    def is_keeper(process: Path) -> bool:
        try:
            words, pid = (process / "cmdline").read_bytes().split(b"\0"), int(process.name)
            return {b"raytrain.keeper.keeper", os.fsencode(run_uri)} <= set(words) and os.getsid(pid) != pid
        except OSError:
            return False

    return [int(process.name) for process in Path("/proc").glob("[0-9]*") if is_keeper(process)]


class Pair:
    """Two processes, or `count`, of one gloo process group. `run` gives what each returned."""

    def __init__(self, meeting_file: Path, count: int = 2) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)  # unless loader workers came first, whose server has torch too
        self._pipes: list[Connection] = []
        self.pids: list[int] = []
        self._processes = []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(rank, count, f"file://{meeting_file}", there), daemon=True)
            process.start()
            self.pids.append(process.pid or 0)
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """[function(0, *args) of the one process, function(1, *args) of the next, ...]."""
        self.ask(function, *args)
        answers: list[tuple[bool, Any]] = []
        for rank in range(len(self._pipes)):
            assert self._pipes[rank].poll(DEADLINE_S), f"rank {rank} does not answer: {[a[1] for a in answers]}"
            answers.append(self.answer(rank))
        failures = [f"rank {rank}:\n{value}" for rank, (worked, value) in enumerate(answers) if not worked]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def ask(self, function: Callable[..., Any], *args: Any) -> None:
        """Have all of them call it."""
        for rank, pipe in enumerate(self._pipes):
            pipe.send_bytes(pickle.dumps((function, (rank, *args))))

    def answer(self, rank: int) -> tuple[bool, Any]:
        """Whether that rank's call returned, and its value or traceback."""
        worked, value = pickle.loads(self._pipes[rank].recv_bytes())
        return worked, value

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def serve(rank: int, count: int, meeting: str, pipe: Connection) -> None:
    """Join the other processes, then answer calls until the pipe is closed."""
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        try:
            answer = pickle.dumps((True, function(*args)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)
    torch.distributed.destroy_process_group()
    sys.exit(0)
