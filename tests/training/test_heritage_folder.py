"""A folder that OpenPCDet has trained in: its newest .pth is gone on from, evaluated and listed, or refused by name."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import raytrain
from raytrain.cli import main
from raytrain.config.load import dump_config, with_overrides
from raytrain.config.sections import Config
from raytrain.errors import CheckpointError, ResumeError
from raytrain.journal.records import read_journal
from raytrain.launch import Result
from raytrain.storage.state_file import load_weights_file
from raytrain.training.evaluate import evaluate

CFG = Config.model_validate(
    {
        "TASK": "tasks_for_units:PredictingTask",
        "TAG": "x",
        "EXP_GROUP_PATH": "kitti_models",
        "EXTRA_TAG": "own",
        "OPTIMIZATION": {"BATCH_SIZE_PER_GPU": 4, "NUM_EPOCHS": 4},
        "SCALE": {"NUM_WORKERS": 0, "VIRTUAL_WORKERS": 1, "USE_GPU": False},
        "CHECKPOINT": {"EVERY_EPOCHS": 1, "KEEP_LAST": 9},
        "LOADER": {"WORKERS": 0},
        "LOG": {"EVERY": 1},
    }
)
STEPS = 12  # an epoch


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run of four epochs, from whose checkpoints files of OpenPCDet are made."""
    return raytrain.train(with_overrides(CFG, ["OUTPUT", str(tmp_path_factory.mktemp("straight"))]), quiet=True)


def payload(straight: Result, epoch: int) -> dict[str, Any]:
    whole = load_weights_file(f"{straight.run_dir}/ckpt/checkpoint_epoch_{epoch}/checkpoint.pth")
    return {key: whole[key] for key in ("epoch", "it", "model_state", "optimizer_state")} | {"version": "pcdet+0.6.0"}


def folder_of(tmp_path: Path) -> Path:
    """`output/kitti_models/x/own/ckpt`."""
    folder = tmp_path / "output" / "kitti_models" / "x" / "own" / "ckpt"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def filled(straight: Result, tmp_path: Path, *epochs: int, legacy: bool = False) -> Path:
    """As OpenPCDet leaves it after these epochs; the times of the files say nothing."""
    folder = folder_of(tmp_path)
    for age, epoch in enumerate(epochs):
        path = folder / f"checkpoint_epoch_{epoch}.pth"
        torch.save(payload(straight, epoch), path, _use_new_zipfile_serialization=not legacy)
        os.utime(path, (1e9 + age * (-1) ** age, 1e9 + age * (-1) ** age))
    return folder


def train(tmp_path: Path, *words: str, **options: Any) -> Result:
    return raytrain.train(with_overrides(CFG, ["OUTPUT", str(tmp_path / "output"), *words]), quiet=True, **options)


def steps_of(result: Result) -> list[int]:
    return [record["step"] for record in read_journal(Path(result.run_dir) / "journal.jsonl", kinds=("step",))]


def notes_of(result: Result) -> str:
    return "\n".join(r["message"] for r in read_journal(Path(result.run_dir) / "journal.jsonl", kinds=("event",)))


def same_weights(result: Result, other: Result) -> bool:
    one, two = (load_weights_file(f"{each.checkpoint}/checkpoint.pth")["model_state"] for each in (result, other))
    return all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("epochs", [(1,), (2, 1), (1, 3, 2)])
def test_auto_goes_on_from_the_newest_by_what_is_in_it(
    straight: Result, tmp_path: Path, epochs: tuple[int, ...], legacy: bool
) -> None:
    filled(straight, tmp_path, *epochs, legacy=legacy)
    result = train(tmp_path)
    assert steps_of(result) == list(range(max(epochs) * STEPS + 1, 4 * STEPS + 1))
    assert f"going on from checkpoint_epoch_{max(epochs)}.pth, after its epoch {max(epochs)}" in notes_of(result)
    assert same_weights(result, straight)


def test_a_latest_model_counts_by_its_place_and_a_file_of_moments_not_at_all(straight: Result, tmp_path: Path) -> None:
    folder = filled(straight, tmp_path, 1)
    middle = {**payload(straight, 2), "epoch": 1, "it": STEPS + 5}
    torch.save(middle, folder / "latest_model.pth")
    torch.save({"optimizer_state": {}}, folder / "checkpoint_epoch_9_optim.pth")
    assert steps_of(train(tmp_path))[0] == STEPS + 6


def test_what_cannot_be_read_is_passed_over_by_name_and_alone_refused(straight: Result, tmp_path: Path) -> None:
    folder = filled(straight, tmp_path, 1, 2)
    (folder / "checkpoint_epoch_3.pth").write_bytes((folder / "checkpoint_epoch_2.pth").read_bytes()[:3000])
    torch.save({"state_dict": {}}, folder / "weights.pth")
    result = train(tmp_path)
    assert steps_of(result)[0] == 2 * STEPS + 1
    assert "passed over" in notes_of(result) and "checkpoint_epoch_3.pth" in notes_of(result)
    assert "weights.pth: it holds no model_state" in notes_of(result)

    alone = folder_of(tmp_path / "alone")
    shutil.copy(folder / "checkpoint_epoch_3.pth", alone)
    with pytest.raises(CheckpointError, match=r"(?s)training never starts over silently.*checkpoint_epoch_3\.pth"):
        train(tmp_path / "alone")


def test_ours_and_theirs_in_one_folder_go_by_epoch(straight: Result, tmp_path: Path) -> None:
    folder = filled(straight, tmp_path, 1)
    train(tmp_path, "OPTIMIZATION.NUM_EPOCHS", "2")
    torch.save(payload(straight, 2), folder / "checkpoint_epoch_2.pth")
    assert train(tmp_path, "OPTIMIZATION.NUM_EPOCHS", "2").status == "complete"
    torch.save(payload(straight, 3), folder / "checkpoint_epoch_3.pth")  # they have trained on
    result = train(tmp_path)
    assert steps_of(result)[-STEPS:] == list(range(3 * STEPS + 1, 4 * STEPS + 1)) and steps_of(result)[-STEPS - 1] < 25


def test_never_refuses_their_folder_too_and_moves_their_files_aside(straight: Result, tmp_path: Path) -> None:
    folder = filled(straight, tmp_path, 1, 2)
    with pytest.raises(ResumeError, match=r"holds a run already \(checkpoint_epoch_2\.pth, checkpoint_epoch_1\.pth"):
        train(tmp_path, resume="never")
    result = train(tmp_path, resume="never", overwrite=True)
    assert steps_of(result)[0] == 1
    assert sorted(path.name for path in folder.glob("superseded/*/*")) == [
        "checkpoint_epoch_1.pth",
        "checkpoint_epoch_2.pth",
    ]


@pytest.mark.parametrize("place", ["the run folder", "its ckpt", "a folder of files", "our ckpt"])
def test_a_folder_says_where_to_go_on(straight: Result, tmp_path: Path, place: str) -> None:
    folder = filled(straight, tmp_path / "there", 1, 3)
    shutil.copytree(folder, tmp_path / "loose")
    places = {
        "the run folder": folder.parent,
        "its ckpt": folder,
        "a folder of files": tmp_path / "loose",
        "our ckpt": f"{straight.run_dir}/ckpt",
    }
    result = train(tmp_path, "OPTIMIZATION.NUM_EPOCHS", "5", ckpt=places[place])
    assert steps_of(result)[0] == (4 if place == "our ckpt" else 3) * STEPS + 1


def test_weights_of_distributed_training_and_without_global_step_are_taken(straight: Result, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    theirs = payload(straight, 2)
    theirs["model_state"] = {f"module.{name}": value for name, value in theirs["model_state"].items()}
    torch.save(theirs, folder / "checkpoint_epoch_2.pth")
    result = train(tmp_path)
    assert same_weights(result, straight)
    assert "names of its weights are taken without 'module.'" in notes_of(result)


def test_their_folder_is_listed(straight: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = filled(straight, tmp_path, 1, 2)
    (folder / "torn.pth").write_bytes(b"torn")
    assert main(["checkpoints", str(folder.parent)]) == 0
    out = capsys.readouterr().out
    assert re.search("OpenPCDet's, epoch 2, iteration 24 +resume takes this", out) and "torn.pth" in out
    assert "going on from checkpoint_epoch_2.pth, after its epoch 2, iteration 24" in out
    assert main(["checkpoints", str(folder)]) == 2
    assert "this lies within a run folder" in capsys.readouterr().err


@pytest.fixture
def config(straight: Result, tmp_path: Path) -> str:
    """The YAML of a run in their folder, which has epochs 1 to 3."""
    filled(straight, tmp_path, 1, 2, 3)
    (tmp_path / "run.yaml").write_text(dump_config(with_overrides(CFG, ["OUTPUT", str(tmp_path / "output")])))
    return str(tmp_path / "run.yaml")


def evaluated(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The checkpoints that a command has evaluated."""
    assert main(["eval", *words]) == 0
    return [Path(line).name for line in capsys.readouterr().out.splitlines() if line.endswith(".pth")]


def test_their_checkpoints_are_evaluated(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = str(tmp_path / "output" / "kitti_models" / "x" / "own" / "ckpt")
    every = [f"checkpoint_epoch_{epoch}.pth" for epoch in (1, 2, 3)]
    assert evaluated(["--cfg_file", config], capsys) == every[2:]
    assert evaluated(["--cfg_file", config, "--ckpt", f"{ckpt}/{every[0]}"], capsys) == every[:1]
    elsewhere = ["--cfg_file", config, "--extra_tag", "other", "--ckpt_dir", ckpt]
    assert evaluated(elsewhere, capsys) == every[2:]
    assert evaluated([*elsewhere, "--eval_all"], capsys) == every
    assert evaluated([*elsewhere, "--eval_all", "--start_epoch", "2"], capsys) == every[1:]
    folders = (tmp_path / "output" / "kitti_models" / "x" / "other").glob("eval/*/val/default/metrics.json")
    assert sorted(path.parts[-4] for path in folders) == ["epoch_1", "epoch_2", "epoch_3"]


def test_our_checkpoints_are_all_evaluated_too(
    straight: Result, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--cfg_file", config, "--eval_all", "--ckpt_dir", straight.run_dir, "--start_epoch", "3"]
    assert main(["eval", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [Path(line).name for line in lines if "/ckpt/checkpoint_epoch_" in line] == [
        "checkpoint_epoch_3",
        "checkpoint_epoch_4",
    ]


def test_weights_alone_are_evaluated(
    straight: Result, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({f"module.{k}": v for k, v in payload(straight, 2)["model_state"].items()}, tmp_path / "w.pth")
    assert evaluated(["--cfg_file", config, "--pretrained_model", str(tmp_path / "w.pth")], capsys) == ["w.pth"]
    cfg = with_overrides(CFG, ["OUTPUT", str(tmp_path / "output")])
    of_weights = evaluate(cfg, pretrained_model=tmp_path / "w.pth")
    ckpt = tmp_path / "output" / "kitti_models" / "x" / "own" / "ckpt" / "checkpoint_epoch_2.pth"
    assert of_weights.metrics == evaluate(cfg, ckpt).metrics
    assert any("without 'module.'" in note for note in of_weights.notes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ckpt", "a.pth", "--eval_all"], "--ckpt names one checkpoint"),
        (["--start_epoch", "2"], "give both or neither"),
        (["--eval_all", "--start_epoch", "8"], "no checkpoint of epoch 8 or later"),
    ],
)
def test_what_eval_cannot_do_is_refused(
    config: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--cfg_file", config, *words]) in (1, 2)
    assert said in capsys.readouterr().err
