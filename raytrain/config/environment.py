"""SCALE.ENV: which environment variables of the command its workers get."""

from __future__ import annotations

import re

PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?")
# Every process has its own of these: what starts it says which.
OWN = re.compile(
    r"RAY_.*|TORCHELASTIC_.*|SLURM_(PROCID|LOCALID|NODEID)|OMPI_COMM_WORLD_.*|PMIX?_RANK|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|NODE_RANK|MASTER_(ADDR|PORT)"
    r"|(CUDA|HIP|ROCR)_VISIBLE_DEVICES|OMP_NUM_THREADS|HOSTNAME|(OLD)?PWD|SHLVL|_"
)
AT_START = re.compile(r"LD_.*|PYTHONHASHSEED")


def checked_pattern(pattern: str) -> str:
    """The pattern; ValueError if it names no variable, or one that would have no effect or the wrong one."""
    if not PATTERN.fullmatch(pattern):
        raise ValueError(f"{pattern!r} is no name of a variable, nor the start of some as in NCCL_*")
    if OWN.fullmatch(pattern.rstrip("*")):
        raise ValueError(f"{pattern} is each process's own, and does not travel; leave it out")
    if AT_START.fullmatch(pattern.rstrip("*")):
        raise ValueError(f"{pattern} is read as a process starts, before it could get it; set it where Ray is started")
    return pattern


def is_own(name: str) -> bool:
    """Whether a variable is no matter of the command's, but of each process."""
    return OWN.fullmatch(name) is not None or AT_START.fullmatch(name) is not None


def travels(name: str, patterns: list[str]) -> bool:
    """Whether a variable is among those that the patterns name."""
    return not is_own(name) and any(name.startswith(p[:-1]) if p.endswith("*") else name == p for p in patterns)
