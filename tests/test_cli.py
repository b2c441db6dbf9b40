"""The command line: OpenPCDet's flags, ours, exit statuses, and how little is loaded before it is needed."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import environment
from small_runs import journal, notes

from raytrain import __version__, cli, launch, load_config
from raytrain.cli import main
from raytrain.config.load import with_overrides
from raytrain.errors import ConfigError
from raytrain.training import evaluate

CONFIG = """\
TASK: bad_tasks:Good
OPTIMIZATION: {OPTIMIZER: adamw, BATCH_SIZE_PER_GPU: 4, NUM_EPOCHS: 2}
SCALE: {NUM_WORKERS: 0, USE_GPU: false}
LOADER: {WORKERS: 0}
"""
HEAVY = ("torch", "ray", "numpy", "pyarrow", "tensorboardX", "rich", "sklearn")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with run.yaml in it."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(words: str) -> argparse.Namespace:
    return cli.build_parser().parse_args(shlex.split(words))


def value_at(tree: dict[str, Any], dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree[key]
    return tree


# OpenPCDet's flags (HERITAGE section 1), each in one of the three lists

SET_A_KEY = {
    "--epochs 7": ("OPTIMIZATION.NUM_EPOCHS", 7),
    "--workers 3": ("LOADER.WORKERS", 3),
    "--extra_tag second": ("EXTRA_TAG", "second"),
    "--extra_tag 2024": ("EXTRA_TAG", "2024"),
    "--sync_bn": ("OPTIMIZATION.SYNC_BN", True),
    "--ckpt_save_interval 4": ("CHECKPOINT.EVERY_EPOCHS", 4),
    "--num_epochs_to_eval 5": ("EVAL.LAST_EPOCHS", 5),
    "--max_ckpt_save_num 12": ("CHECKPOINT.KEEP_LAST", 12),
    "--logger_iter_interval 20": ("LOG.LINE_EVERY", 20),
    "--task pointpillars": ("TASK", "raytrain.tasks.pointpillars.task:PointPillars"),
    "--task openpcdet": ("TASK", "raytrain.tasks.openpcdet:OpenPCDetTask"),
    "--task a.b:C": ("TASK", "a.b:C"),
    "--ckpt_save_time_interval 60": ("CHECKPOINT.EVERY_SECONDS", 60.0),
    "--use_amp": ("OPTIMIZATION.USE_AMP", True),
    "--set OPTIMIZATION.LR 1e-3 OPTIMIZATION.NUM_EPOCHS 9": ("OPTIMIZATION.NUM_EPOCHS", 9),
}
OPTIONS = {
    "--batch_size 16": ("batch_size", 16),
    "--ckpt a/checkpoint_epoch_3.pth": ("ckpt", "a/checkpoint_epoch_3.pth"),
    "--pretrained_model weights.pth": ("pretrained_model", "weights.pth"),
}
VOID = [
    "--local_rank 0",
    "--local-rank=0",
    "--fix_random_seed",
    "--merge_all_iters_to_one_epoch",
    "--max_waiting_mins 0",
    "--start_epoch 0",
    "--save_to_file",
    "--use_tqdm_to_record",
    "--wo_gpu_stat",
]
OURS = {
    "--num_workers 5": ("SCALE.NUM_WORKERS", 5),
    "--use_gpu": ("SCALE.USE_GPU", True),
    "--no_gpu": ("SCALE.USE_GPU", False),
    "--output elsewhere": ("OUTPUT", "elsewhere"),
    "--seed 9": ("SEED", 9),
}


@pytest.mark.parametrize("words", [*SET_A_KEY, *OURS])
def test_a_flag_sets_its_config_key(folder: Path, words: str) -> None:
    key, value = {**SET_A_KEY, **OURS}[words]
    found = value_at(cli.load(parsed(f"train --cfg_file run.yaml {words}")).to_tree(), key)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("words", "least", "most"),
    [
        ("--num_workers 2-8", 2, 8),
        ("--num_workers 2-", 2, None),
        ("--num_workers 4", None, 4),
        ("--num_workers 0", None, 0),
        ("--set SCALE.MIN_WORKERS 3", 3, 5),
        ("--num_workers 2-8 --set SCALE.NUM_WORKERS 6", 2, 6),
    ],
)
def test_a_number_of_workers_is_one_or_a_range(folder: Path, words: str, least: int | None, most: int | None) -> None:
    text = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(text.replace("NUM_WORKERS: 0", "NUM_WORKERS: 5, MIN_WORKERS: 2"))
    scale = cli.load(parsed(f"train --cfg_file run.yaml {words}")).SCALE
    assert (least, most) == (scale.MIN_WORKERS, scale.NUM_WORKERS)
    assert scale.is_elastic == (least is not None)


@pytest.mark.parametrize("words", OPTIONS)
def test_a_flag_becomes_an_option_of_the_launch(words: str) -> None:
    name, value = OPTIONS[words]
    assert getattr(parsed(f"train --cfg_file run.yaml {words}"), name) == value


@pytest.mark.parametrize("words", VOID)
def test_a_flag_with_nothing_left_to_do_is_accepted_with_one_line(
    folder: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = parsed(f"train --cfg_file run.yaml {words} --epochs 3")
    note = capsys.readouterr().err
    flag = words.replace("=", " ").split()[0]
    assert note.startswith(f"note: {flag} has no effect here: ") and note.count("\n") == 1
    assert cli.load(args).OPTIMIZATION.NUM_EPOCHS == 3


@pytest.mark.parametrize(
    "words",
    [
        "--local_rank 0",
        "--max_waiting_mins 30",
    ],
)
def test_an_evaluation_too_accepts_flags_with_nothing_left_to_do(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parsed(f"eval --cfg_file run.yaml {words} --workers 3 --eval_tag second --ckpt a.pth --save_to_file")
    assert capsys.readouterr().err.startswith(f"note: {words.split()[0]} has no effect here: ")


@pytest.mark.parametrize(
    ("command", "function", "only_in_python"),
    [("train", launch.train, {"quiet"}), ("eval", evaluate.evaluate, set()), ("view", evaluate.view, set())],
)
def test_what_python_takes_is_called_as_the_flag_is(command: str, function: Any, only_in_python: set[str]) -> None:
    flags = set(vars(parsed(f"{command} --cfg_file run.yaml")))
    assert set(inspect.signature(function).parameters) - {"cfg"} - only_in_python <= flags


def test_ckpt_and_pretrained_model_do_in_python_what_the_flags_do(folder: Path) -> None:
    assert main(shlex.split("train --cfg_file run.yaml")) == 0
    older = folder / "output" / "run" / "default" / "ckpt" / "checkpoint_epoch_1"
    cfg = load_config(folder / "run.yaml", ["EXTRA_TAG", "again"])
    again = launch.train(cfg, ckpt=older, quiet=True)
    assert [run["resumed_from"] for run in journal(again.run_dir, "run")] == [str(older)]
    assert evaluate.evaluate(cfg, ckpt=older).checkpoint == str(older)
    with pytest.raises(ConfigError, match="ckpt and resume both say where to go on"):
        launch.train(cfg, ckpt=older, resume="never", quiet=True)
    weights = older / "checkpoint.pth"
    begun = launch.train(with_overrides(cfg, ["EXTRA_TAG", "begun"]), pretrained_model=weights, quiet=True)
    assert any(f"tensors from {weights}" in note for note in notes(begun.run_dir))
    assert launch.train(with_overrides(cfg, ["EXTRA_TAG", "begun"]), pretrained_model=weights, quiet=True).notes == [
        f"--pretrained_model {weights} is not used: the run is complete"
    ]


def test_set_wins_over_a_flag(folder: Path) -> None:
    cfg = cli.load(parsed("train --cfg_file run.yaml --epochs 3 --set OPTIMIZATION.NUM_EPOCHS 5"))
    assert cfg.OPTIMIZATION.NUM_EPOCHS == 5


def test_epochs_before_the_last_are_evaluated_too(folder: Path) -> None:
    words = "--epochs 5 --num_epochs_to_eval 2 --set EVAL.EVERY null"
    assert main(shlex.split(f"train --cfg_file run.yaml {words}")) == 0
    assert [record["epoch"] for record in journal("output/run/default", "eval")] == [3, 4, 5]


def test_the_batch_size_is_the_total_over_the_virtual_workers(folder: Path) -> None:
    assert main(shlex.split("train --cfg_file run.yaml --batch_size 6 --set SCALE.VIRTUAL_WORKERS 2")) == 0
    written = yaml.safe_load((folder / "output/run/default/config.yaml").read_text())
    assert written["OPTIMIZATION"]["BATCH_SIZE_PER_GPU"] == 3


# Exit statuses


def test_a_finished_run_ends_with_0_and_so_does_the_same_command_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = shlex.split("train --cfg_file run.yaml")
    assert main(command) == 0
    assert "finished after epoch 2, step 6" in capsys.readouterr().out
    files = {path: path.stat().st_mtime_ns for path in folder.glob("output/run/default/ckpt/*/*")}
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("already complete: all 2 epochs are trained") and str(folder / "output/run/default") in out
    assert {path: path.stat().st_mtime_ns for path in folder.glob("output/run/default/ckpt/*/*")} == files


def test_a_run_stopped_by_a_signal_ends_with_75_and_the_same_command_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = shlex.split("train --cfg_file run.yaml --set TASK bad_tasks:StoppedOnce")
    assert main(command) == 75
    assert "stopped after epoch 0, step 1" in capsys.readouterr().out
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "resumed from" in out and "finished after epoch 2, step 6" in out


@pytest.mark.parametrize(("words", "status"), [("--set TASK bad_tasks:SampleRaises", 1), ("--epochs 0", 2)])
def test_what_fails_ends_with_1_and_what_is_asked_wrongly_with_2(folder: Path, words: str, status: int) -> None:
    assert main(shlex.split(f"train --cfg_file run.yaml {words}")) == status


def test_the_status_of_the_process_is_that_of_the_command(folder: Path) -> None:
    for words, status in (("show-config --cfg_file run.yaml", 0), ("show-config --cfg_file none.yaml", 2)):
        done = subprocess.run([sys.executable, "-m", "raytrain", *words.split()], capture_output=True, check=False)
        assert done.returncode == status
        assert (b"Traceback" not in done.stderr) and bool(done.stderr) == bool(status)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"raytrain {__version__}\n"


# show-config and eval


def test_the_config_that_is_shown_loads_again_to_an_equal_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--cfg_file run.yaml --epochs 3 --extra_tag second --set MODEL.WIDTH 5 SCALE.RESOURCES fast_disk:1"
    assert main(shlex.split(f"show-config {words}")) == 0
    (folder / "shown.yaml").write_text(capsys.readouterr().out)
    assert load_config(folder / "shown.yaml") == cli.load(parsed(f"train {words}"))


def test_a_run_is_evaluated_from_its_own_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split("train --cfg_file run.yaml")) == 0
    trained = capsys.readouterr().out
    assert main(shlex.split("eval --cfg_file run.yaml --eval_tag again --save_to_file --infer_time")) == 0
    path, metric, timed, results = capsys.readouterr().out.splitlines()
    assert path == str(folder / "output/run/default/ckpt/checkpoint_epoch_2")
    assert metric.split()[0] == "error" and metric.split()[1][:5] in trained
    assert re.fullmatch(r"  infer time   [0-9.]+ ms a batch of 4: the mean of 1, 1 before it", timed)
    assert results.split() == ["results", str(folder / "output/run/default/eval/epoch_2/val/again")]
    assert {file.name for file in Path(results.split()[1]).iterdir()} == {"metrics.json", "predictions.pt"}


def test_a_failing_evaluation_shows_the_users_own_traceback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split("train --cfg_file run.yaml --set TASK bad_tasks:Good")) == 0
    capsys.readouterr()
    named = "--ckpt output/run/default/ckpt/checkpoint_epoch_2"
    assert main(shlex.split(f"eval --cfg_file run.yaml {named} --set TASK bad_tasks:ScoreRaises")) == 1
    error = capsys.readouterr().err
    assert error.startswith("raytrain: The evaluation failed on rank 0\n")
    assert "in score" in error and "raytrain/training/loop.py" not in error


# What is loaded before it is needed


@pytest.mark.parametrize(
    ("words", "status", "light"),
    [
        ("--help", 0, True),
        ("train --help", 0, True),
        ("simulate --help", 0, True),
        ("train --cfg_file run.yaml --epoch 3", 2, True),
        ("train", 2, True),
        ("train --cfg_file none.yaml", 2, False),
        ("train --cfg_file run.yaml --set OPTIMIZATION.LRR 1", 2, False),
        ("train --cfg_file run.yaml --ckpt a --resume b", 2, False),
        ("train --cfg_file run.yaml --num_workers 2 --output ~nobody-here/runs", 2, False),
        ("tune --cfg_file run.yaml --output ~nobody-here/runs", 2, False),
        ("show-config --cfg_file run.yaml", 0, False),
    ],
)
def test_help_and_config_errors_wait_for_nothing_heavy(folder: Path, words: str, status: int, light: bool) -> None:
    """Neither torch nor ray; help and wrong flags do without the config's libraries too."""
    code = (
        "import sys\nfrom raytrain.cli import main\n"
        f"try: status = main({shlex.split(words)!r})\n"
        "except SystemExit as ended: status = ended.code\n"
        f"names = {HEAVY} + (('pydantic', 'yaml') if {light} else ())\n"
        "print('loaded', status, [name for name in names if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"loaded {status} []"


@pytest.mark.parametrize("words", ["train --num_workers 2", "tune"])
def test_a_cluster_begins_to_start_before_torch_is_imported(folder: Path, words: str) -> None:
    """Torch takes a second, and the cluster needs as long: they go on side by side."""
    code = (
        "import sys\nfrom raytrain.cli import main\nfrom raytrain.cluster import cluster\n"
        "def begin(*asked): print('torch' in sys.modules, file=sys.stderr); raise SystemExit(9)\n"
        "cluster.LocalCluster = begin\n"
        f"main({[*words.split(), '--cfg_file', 'run.yaml']!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (9, "False\n")


@pytest.mark.ray
def test_training_loads_none_of_what_torch_compiles_with(folder: Path) -> None:
    """Each would make every worker's first step, or a run's end, seconds late. Two virtual workers share a step."""
    code = (
        "import sys\nfrom raytrain.cli import main\n"
        "status = main(['train', '--cfg_file', 'run.yaml', '--set', 'SCALE.VIRTUAL_WORKERS', '2'])\n"
        "names = ('sympy', 'torch._dynamo', 'torch._inductor', 'ray')\n"
        "print('loaded', status, [name for name in names if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.splitlines()[-1] == "loaded 0 []"


def test_help_fits_its_reader(capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag that does something is explained; those that do nothing do not take the reader's time."""
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    told = capsys.readouterr().out
    flags = [*cli.CONFIG_FLAGS, *cli.SWITCHES, "--batch_size", "--ckpt", "--pretrained_model", "--set", "--address"]
    flags += ["--resume", "--overwrite", "--allow-config-change"]
    assert [flag for flag in flags if flag not in told] == []
    assert [flag for flag in cli.IGNORED_FLAGS if f"{flag} " in told] == []


def test_a_pipe_that_is_closed_early_is_no_error(folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "raytrain", "show-config", "--cfg_file", "run.yaml"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.stderr == b""


@pytest.mark.parametrize(
    "words",
    [
        *("--help", "--version", "train --help", "tune --help", "show-config --reference"),
        *("show-config --cfg_file run.yaml", "show-config --cfg_file run.yaml --set SEED 3"),
    ],
)
def test_what_cannot_be_printed_is_told_in_one_line(
    folder: Path, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(shlex.split(words)) == 1
    said = "raytrain: standard output: cannot print there: No space left on device. Free some space, or send it"
    assert capsys.readouterr().err == f"{said} elsewhere\n"


def test_a_current_folder_that_was_removed_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = folder / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    with pytest.raises(SystemExit) as ended:
        main(["show-config", "--cfg_file", str(folder / "run.yaml")])
    assert ended.value.code == 2
    assert "the current folder has been removed; go to one that exists" in capsys.readouterr().err


def test_a_dashboard_without_a_cluster_to_show_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    assert main(["train", "--cfg_file", str(tmp_path / "run.yaml"), "--output", str(tmp_path), "--dashboard"]) == 2
    assert "--dashboard is Ray's, of a cluster that is started for the run" in capsys.readouterr().err
