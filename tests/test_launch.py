"""torchrun starts the processes of a run: the same loop and the same bits, and no Ray."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ROOT, Launched, torchrun, wait_for

from raytrain.cli import main
from raytrain.journal.records import read_journal
from raytrain.storage import processes
from raytrain.training.preflight import driver

pytestmark = pytest.mark.ray
DIGITS = ROOT / "configs" / "digits.yaml"
NO_RAY = "import sys; sys.modules['ray'] = None; from raytrain.cli import main; sys.exit(main())"
SMALL = """
TASK: {task}
OPTIMIZATION: {{BATCH_SIZE_PER_GPU: 4, NUM_EPOCHS: 2}}
SCALE: {{USE_GPU: false}}
LOADER: {{WORKERS: 0}}
LOG: {{EVERY: 1}}
"""


def on_two(folder: Path, *words: str, program: tuple[str, ...] = ("-m", "raytrain")) -> Launched:
    """`torchrun --nproc_per_node 2 -m raytrain train WORDS`, in `folder`."""
    return torchrun([*program, "train", "--output", str(folder / "output"), *words], folder)


def small(folder: Path, task: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(SMALL.format(task=task))
    return path


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "ckpt" / "checkpoint_epoch_2" / "checkpoint.pth", weights_only=True)["model_state"]


def test_two_processes_train_to_the_bits_of_two_virtual_workers_and_import_no_ray(tmp_path: Path) -> None:
    config = small(tmp_path, "tasks_for_units:PredictingTask")
    words = ["--launcher", "pytorch", "--extra_tag", "there", "--cfg_file", str(config)]
    out = on_two(tmp_path, *words, program=("-c", NO_RAY)).ended(0)
    assert len(re.findall("finished after epoch 2", out)) == 1 and "2 workers (cpu)" in out and "note:" not in out
    output = tmp_path / "output" / "run"
    assert (output / "there" / "logs" / "rank_1.log").exists()
    words = ["train", "--cfg_file", str(config), "--output", str(tmp_path / "output"), "--num_workers", "0"]
    assert main([*words, "--set", "SCALE.VIRTUAL_WORKERS", "2"]) == 0
    there, here = weights(output / "there"), weights(output / "default")
    assert list(there) == list(here) and all(torch.equal(there[name], here[name]) for name in here)


def test_a_rank_that_fails_is_shown_once_and_ends_the_run(tmp_path: Path) -> None:
    out = on_two(tmp_path, "--cfg_file", str(small(tmp_path, "tasks_for_units:FailsOnRank1"))).ended(1)
    assert out.count("no anchors for 4 points") == 1 and out.count("failed on rank") == 1, out
    assert "failed on rank 1" in out
    *_, failure = read_journal(tmp_path / "output" / "run" / "default" / "journal.jsonl")
    assert failure["event"] == "failure" and failure["message"].startswith("Training failed on rank 1 at step ")


def test_a_log_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    log = tmp_path / "output" / "run" / "default" / "logs" / "rank_1.log"
    log.mkdir(parents=True)
    out = on_two(tmp_path, "--cfg_file", str(small(tmp_path, "tasks_for_units:PredictingTask"))).ended(1)
    assert out.count(f"raytrain: {log}: cannot write this log: Is a directory") == 1, out


def test_a_rank_that_is_killed_in_the_evaluation_is_not_taken_for_a_failure_of_the_other(tmp_path: Path) -> None:
    out = on_two(tmp_path, "--cfg_file", str(small(tmp_path, "tasks_for_units:DiesInEvaluation"))).ended(1)
    assert "raytrain: another worker process has died; rank 0 waited for it" in out, out
    assert "failed on rank 0" not in out and "gloo" not in out


@pytest.mark.parametrize("words", [["--num_workers", "3"], ["--address", "head:6379"], ["--resume", "nowhere"]])
def test_what_cannot_be_is_said_once(tmp_path: Path, words: list[str]) -> None:
    late = "import os, time; time.sleep(os.environ['RANK'] == '0')"  # who is to say it comes last
    program = ("-c", f"{late}; import sys; from raytrain.cli import main; sys.exit(main())")
    config = small(tmp_path, "tasks_for_units:PredictingTask")
    out = on_two(tmp_path, "--cfg_file", str(config), *words, program=program).ended(1)
    assert out.count("raytrain: ") == 1, out
    assert words[1] in out


def test_nobody_waits_for_a_rank_that_cannot_begin(tmp_path: Path) -> None:
    """As where a host has fewer GPUs than processes; torchrun kills only after 30 s what does not heed its SIGTERM."""
    one = "import os, sys; from raytrain.cli import main; sys.exit(main() if os.environ['RANK'] == '0' else 1)"
    began = time.monotonic()
    config = small(tmp_path, "tasks_for_units:PredictingTask")
    out = on_two(tmp_path, "--cfg_file", str(config), program=("-c", one)).ended(1)
    assert time.monotonic() - began < 25, out


def test_a_sigterm_to_torchrun_stops_the_run_with_its_state_saved(tmp_path: Path) -> None:
    launched = on_two(tmp_path, "--cfg_file", str(DIGITS), "--epochs", "2000", "--workers", "0")
    journal = tmp_path / "output" / "digits" / "default" / "journal.jsonl"
    wait_for(lambda: journal.exists() and '"kind": "step"' in journal.read_text(), "a step")
    os.kill(launched.pid, signal.SIGTERM)
    out = launched.ended(1)  # torchrun's own
    assert '"status": "stopped"' in journal.read_text().splitlines()[-1], out
    assert [path.name for path in sorted((journal.parent / "ckpt").glob("checkpoint_step_*"))]


def test_what_keeps_a_run_going_is_torchrun_also_where_a_script_stands_between() -> None:
    code = f"{sys.executable} -c 'from raytrain.training.preflight import driver; print(driver()[1])'; true"
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "a"}
    told = subprocess.run(["bash", "-c", f'bash -c "{code}"; true'], env=env, capture_output=True, text=True)
    assert int(told.stdout) == os.getpid(), told.stderr  # in place of torchrun, in whose environment it is not


def test_a_torchrun_that_dies_as_it_is_looked_for_is_told_as_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setattr(os, "getppid", lambda: ended.pid)
    host, pid, started = driver()
    assert (host, pid) == (processes.host(), ended.pid)
    assert started is not None and started != processes.started_at(pid)
    assert processes.parent_of(ended.pid) == 0


def test_a_task_that_exits_has_not_finished_the_run(tmp_path: Path) -> None:
    config = small(tmp_path, "tasks_for_units:ExitsTask")
    out = on_two(tmp_path, "--cfg_file", str(config)).ended(1)
    assert "Training failed on rank" in out and "at step 3" in out and "SystemExit: 0" in out
