"""How the workers of a cluster of the run's own find each other: by a file, which nobody outside the machine can reach.

The server by which torch's processes meet otherwise (a TCPStore) listens on every address of the machine and asks for
no token; who writes to it can name himself as a worker. Private parts of Ray: for the versions in local_cluster.TESTED.
"""

from __future__ import annotations

import os
import secrets
import socket
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend

from raytrain.cluster.local_cluster import connected_node


class FileRendezvous(TorchConfig):
    """A TorchConfig for workers that are all on this machine."""

    @property
    def backend_cls(self) -> Any:
        return _FileBackend


class _FileBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_set_torch_distributed_env_vars)
        worker_group.execute(_listen_on, loopback())
        # In the folder of the cluster, which goes with it: a worker that is killed leaves the file.
        folder = connected_node().get_session_dir_path()
        group = {
            "backend": backend_config.backend,
            "world_size": len(worker_group),
            "init_method": f"file://{folder}/rendezvous-{secrets.token_hex(4)}",
            "timeout_s": backend_config.timeout_s,
        }
        joined = [
            worker_group.execute_single_async(rank, _setup_torch_process_group, world_rank=rank, **group)
            for rank in range(len(worker_group))
        ]
        ray.get(joined)


def loopback() -> str:
    """The name of this machine's loopback interface: lo, or lo0."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _listen_on(interface: str) -> None:
    """Else gloo listens where the name of the machine leads."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface
