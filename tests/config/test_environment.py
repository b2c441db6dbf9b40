"""SCALE.ENV takes names of variables, and refuses those that cannot travel."""

from __future__ import annotations

import pytest

from raytrain.config.environment import checked_pattern, travels


@pytest.mark.parametrize("pattern", ["MY_DATA", "_x", "NCCL_*", "CUDA_*", "HF_TOKEN", "OMP_*"])
def test_names_and_prefixes_are_taken(pattern: str) -> None:
    assert checked_pattern(pattern) == pattern


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("", "no name of a variable"),
        ("*", "no name of a variable"),
        ("A=1", "no name of a variable"),
        ("*_TOKEN", "no name of a variable"),
        ("RANK", "each process's own"),
        ("RAY_*", "each process's own"),
        ("SLURM_PROCID", "each process's own"),
        ("OMPI_COMM_WORLD_RANK", "each process's own"),
        ("CUDA_VISIBLE_DEVICES", "each process's own"),
        ("LD_LIBRARY_PATH", "as a process starts"),
        ("PYTHONHASHSEED", "as a process starts"),
    ],
)
def test_what_cannot_travel_is_refused(pattern: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        checked_pattern(pattern)


@pytest.mark.parametrize(
    ("name", "patterns", "goes"),
    [
        ("MY_DATA", ["MY_DATA"], True),
        ("MY_DATA_2", ["MY_DATA"], False),
        ("MY_DATA_2", ["MY_*"], True),
        ("NCCL_DEBUG", ["HF_TOKEN", "NCCL_*"], True),
        ("CUDA_LAUNCH_BLOCKING", ["CUDA_*"], True),
        ("CUDA_VISIBLE_DEVICES", ["CUDA_*"], False),
        ("RAY_ADDRESS", ["R*"], False),
        ("SLURM_LOCALID", ["SLURM_*"], False),
        ("SLURM_JOB_ID", ["SLURM_*"], True),
        ("LD_PRELOAD", ["L*"], False),
        ("MY_DATA", [], False),
    ],
)
def test_which_travel(name: str, patterns: list[str], goes: bool) -> None:
    assert travels(name, patterns) is goes
