"""Tasks that Slurm's srun starts form one run; no Slurm is needed for that, only what it says to its tasks."""

import re
from pathlib import Path

import pytest
import torch
from commands import Launched, commanded

from raytrain import cli
from raytrain.errors import ConfigError
from raytrain.journal.records import read_journal
from raytrain.launcher import first_node, join_slurm

STEP = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NODELIST": "gpu7"}
CONFIG = """\
TASK: tasks_for_units:{task}
OPTIMIZATION: {{OPTIMIZER: sgd, SCHEDULER: constant, BATCH_SIZE_PER_GPU: 4, NUM_EPOCHS: 2, LR: 0.05}}
LOADER: {{WORKERS: 0}}
LOG: {{EVERY: 1}}
"""


def written(folder: Path, task: str = "PredictingTask") -> str:
    (folder / "run.yaml").write_text(CONFIG.format(task=task))
    return "run.yaml"


def srun(folder: Path, *words: str, size: int = 2, **others: str) -> list[Launched]:
    """`srun --ntasks 2 raytrain WORDS` on one node, as its tasks see it."""
    step = {**STEP, "SLURM_NTASKS": str(size), "OMP_NUM_THREADS": "1", **others}
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(size)]
    return [commanded([*words, "--launcher", "slurm"], folder, {**step, **rank}) for rank in ranks]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu03", "gpu03"),
        ("gpu03,gpu04", "gpu03"),
        ("gpu[03-05,9],login", "gpu03"),
        ("gpu[3,7-9]-ib,login", "gpu3-ib"),
        ("a-b.c,gpu[1-2]", "a-b.c"),
        ("r1[01-02]", "r101"),
    ],
)
def test_tasks_meet_on_the_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_what_slurm_says_becomes_what_torch_asks_for() -> None:
    several = {**STEP, "SLURM_NODELIST": "gpu[2-3]", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    join_slurm(several)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [several[name] for name in names] == ["1", "2", "1", "gpu2", "24711"]
    chosen = {**STEP, "SLURM_PROCID": "0"}
    join_slurm(chosen, "18888")
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("127.0.0.1", "18888")
    alone = {**STEP, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    join_slurm(alone)
    assert "RANK" not in alone
    with pytest.raises(ConfigError, match="SLURM_PROCID is not set"):
        join_slurm({"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "2"})  # a batch script itself


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_launcher_that_there_is_not_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--cfg_file", "run.yaml", "--launcher", "nonsense"])
    assert ended.value.code == 2
    assert "invalid choice: 'nonsense' (choose from 'none', 'pytorch', 'slurm')" in capsys.readouterr().err


@pytest.mark.ray
def test_tasks_of_a_slurm_step_are_the_workers_of_one_run(tmp_path: Path) -> None:
    outs = [task.ended(0) for task in srun(tmp_path, "train", "--cfg_file", written(tmp_path), "--extra_tag", "there")]
    assert len(re.findall("finished after epoch 2", "".join(outs))) == 1 and "2 workers (cpu)" in outs[0], outs
    assert outs[1] == ""
    words = ["train", "--cfg_file", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "output")]
    assert cli.main([*words, "--num_workers", "0", "--set", "SCALE.VIRTUAL_WORKERS", "2"]) == 0
    there, here = (
        torch.load(tmp_path / "output" / "run" / tag / "ckpt" / "checkpoint_epoch_2" / "checkpoint.pth")["model_state"]
        for tag in ("there", "default")
    )
    assert all(torch.equal(there[name], here[name]) for name in here)
    evaluated = [task.ended(0) for task in srun(tmp_path, "eval", "--cfg_file", "run.yaml", "--extra_tag", "there")]
    assert "checkpoint_epoch_2" in evaluated[0] and evaluated[1] == "", evaluated


@pytest.mark.ray
def test_a_task_of_a_slurm_step_that_fails_is_shown_once_and_ends_the_others(tmp_path: Path) -> None:
    tasks = srun(tmp_path, "train", "--cfg_file", written(tmp_path, "FailsOnRank1"))
    out = "".join(task.ended(1) for task in tasks)
    assert out.count("no anchors for 4 points") == 1 and out.count("failed on rank 1") == 1, out
    *_, failure = read_journal(tmp_path / "output" / "run" / "default" / "journal.jsonl")
    assert failure["message"].startswith("Training failed on rank 1 at step ")


@pytest.mark.ray
def test_what_cannot_be_is_said_by_one_task_of_a_slurm_step(tmp_path: Path) -> None:
    tasks = srun(tmp_path, "train", "--cfg_file", written(tmp_path), "--num_workers", "3")
    out = "".join(task.ended(2) for task in tasks)
    assert out == "raytrain: --num_workers 3, but Slurm has started 2 processes; leave the flag out\n"
