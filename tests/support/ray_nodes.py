"""A Ray cluster of several nodes on this machine, in a process of its own: `python ray_nodes.py`.

It prints the head's address. For each line `add` it adds a node of two CPUs and prints its id; for `kill` it kills the
last one's raylet. It ends with its input. The head has no CPU.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


class Nodes:
    """The cluster at `address`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = self._answer()

    def add(self) -> str:
        """The id of a node that is there now, with room for two workers."""
        return self._asked("add")

    def kill(self) -> None:
        """SIGKILL for the raylet of the node that was added last, which Ray's processes of a node do not outlive."""
        self._asked("kill")

    def drain(self, node: str) -> None:
        """What an autoscaler does when a spot instance is to be taken away in a minute."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + 60) * 1000)
        accepted, why = GcsClient(address=self.address).drain_node(node, reason, "spot", deadline_ms)
        assert accepted, why

    def _asked(self, word: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        lines = (line.split() for line in self._process.stdout)
        return next(words[1] for words in lines if words[:1] == ["node"])


@contextlib.contextmanager
def ray_nodes() -> Iterator[Nodes]:
    """The cluster for the time of the block; nothing is left of it."""
    with tempfile.TemporaryDirectory(prefix="rt-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()
        env = {**os.environ, "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        with subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                yield Nodes(process)
            finally:
                process.communicate()


def main() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(num_cpus=0, include_dashboard=False)
    print("node", cluster.address, flush=True)
    for line in sys.stdin:
        if line == "add\n":
            node = cluster.add_node(num_cpus=2)
        else:
            [raylet] = node.all_processes["raylet"]
            raylet.process.kill()
            raylet.process.wait()  # as long as it is a zombie, its workers take it to be alive
        print("node", node.node_id, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
