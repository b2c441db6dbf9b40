"""Two processes joined by gloo that run functions of the test modules: torch is imported once a session."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

DEADLINE_S = 60.0


class Pair:
    """Two processes of one gloo process group. `run` gives what both returned."""

    def __init__(self, meeting_file: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(rank, f"file://{meeting_file}", there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """[function(0, *args) of the one process, function(1, *args) of the other]."""
        for rank, pipe in enumerate(self._pipes):
            pipe.send_bytes(pickle.dumps((function, (rank, *args))))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(DEADLINE_S), f"rank {rank} does not answer: {[a[1] for a in answers]}"
            answers.append(pickle.loads(pipe.recv_bytes()))
        failures = [f"rank {rank}:\n{value}" for rank, (worked, value) in enumerate(answers) if not worked]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def serve(rank: int, meeting: str, pipe: Connection) -> None:
    """Join the other process, then answer calls until the pipe is closed."""
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
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
