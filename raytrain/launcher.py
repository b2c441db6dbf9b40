"""Who has started this process as one of several: torchrun, or Slurm's srun (`--launcher slurm`)."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from raytrain.errors import ConfigError

TORCHRUN, SLURM = "TORCHELASTIC_RUN_ID", "RAYTRAIN_SLURM_STEP"  # variables that tell
PORTS = range(20_000, 30_000)  # of which a Slurm job takes one by its number, so that two on one node do not meet


def name_here() -> str | None:
    """What users call the one that has started this process; None where nobody has."""
    return "torchrun" if TORCHRUN in os.environ else "Slurm" if SLURM in os.environ else None


def world_here() -> tuple[int, int] | None:
    """Rank of this process and number of all, if it is one of several."""
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if name_here() else None


def join_slurm(environ: MutableMapping[str, str] = os.environ, tcp_port: str | None = None) -> None:
    """Have the tasks of a Slurm step find each other by what Slurm says of them, as torchrun's processes do.

    A step of one task is left as it is: that trains as anywhere else.   Raises ConfigError outside of a step.
    """
    if not environ.get("SLURM_PROCID"):
        raise ConfigError(
            "--launcher slurm is for the tasks that srun starts, and this process is none of them (SLURM_PROCID is not "
            "set). Start it by `srun --ntasks N`, or leave --launcher out"
        )
    size = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1")
    if int(size) == 1 or TORCHRUN in environ:
        return
    job, step = environ.get("SLURM_JOB_ID", "0"), environ.get("SLURM_STEP_ID", "0")
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "")
    is_one_node = not set(nodes) & set(",[")
    number = int(re.sub(r"\D", "", job) or 0) + int(re.sub(r"\D", "", step) or 0)
    environ.update(
        {
            SLURM: f"{job}.{step}",
            "RANK": environ["SLURM_PROCID"],
            "WORLD_SIZE": size,
            "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
            "MASTER_ADDR": "127.0.0.1" if is_one_node else first_node(nodes),
            "MASTER_PORT": tcp_port or str(PORTS[number % len(PORTS)]),
        }
    )


def first_node(nodes: str) -> str:
    """The first of a list of nodes as Slurm writes it: `gpu[03-05,9],login` -> `gpu03`."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^\[,]*))?", nodes)
    if found is None:
        raise ConfigError(f"SLURM_NODELIST is {nodes!r}, of which no first node can be read")
    return "".join(part or "" for part in found.groups())
