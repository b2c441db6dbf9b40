"""Whose result is this: what a finished run says to another config, another file of its name, or other code."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import torchrun
from small_runs import notes

import raytrain
from raytrain.cli import main
from raytrain.config.load import load_config, with_overrides
from raytrain.config.sections import Config
from raytrain.errors import ResumeError
from raytrain.launch import Result

CODE = """
import torch
from raytrain import ModelReturn, Task
from {name}_slope import SLOPE


class Up(Task):
    def build_dataset(self, split):
        x = torch.linspace(-1, 1, 16).unsqueeze(1)
        return torch.utils.data.TensorDataset(x, SLOPE * x)

    def build_model(self, dataset):
        return torch.nn.Linear(1, 1)

    def model_func(self, model, batch):
        return ModelReturn((model(batch[0]) - batch[1]).square().mean())


class Down(Up):
    pass
"""
YAML = """
TASK: {name}:Up
OUTPUT: {output}
MODEL: {{WIDTH: 1}}
DATA_CONFIG: {{ROOT: data}}
OPTIMIZATION: {{OPTIMIZER: adamw, LR: 0.1, BATCH_SIZE_PER_GPU: 4, NUM_EPOCHS: 2}}
SCALE: {{NUM_WORKERS: 0, USE_GPU: false}}
LOADER: {{WORKERS: 0}}
EVAL: {{PICTURES: 0}}
"""


@dataclasses.dataclass(frozen=True)
class Project:
    """A finished run, with the YAML that it was trained from and the code of its task."""

    folder: Path
    yaml: Path
    slope: Path
    result: Result

    def config(self, *words: str) -> Config:
        return load_config(self.yaml, words)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("project")
    made = project_in(folder, "results_up")
    yield made
    sys.path.remove(str(folder))


def project_in(folder: Path, name: str) -> Project:
    (folder / f"{name}.py").write_text(CODE.format(name=name))
    slope, yaml = folder / f"{name}_slope.py", folder / "a" / "train.yaml"
    slope.write_text("SLOPE = 3.0\n")
    yaml.parent.mkdir()
    yaml.write_text(YAML.format(name=name, output=folder / "output"))
    sys.path.insert(0, str(folder))
    return Project(folder, yaml, slope, raytrain.train(load_config(yaml), quiet=True))


# What a finished run says: "refused", the keys that are told, or nothing at all.
TOLD = {
    "OPTIMIZATION.LR 0.001": "OPTIMIZATION.LR: was 0.1, now 0.001",
    "OPTIMIZATION.WEIGHT_DECAY 0": "OPTIMIZATION.WEIGHT_DECAY: was 0.01, now 0.0",
    "OPTIMIZATION.NUM_EPOCHS 1": "OPTIMIZATION.NUM_EPOCHS: was 2, now 1",
    "OPTIMIZATION.GRAD_NORM_CLIP null": "OPTIMIZATION.GRAD_NORM_CLIP: was 10.0, now None",
    "MODEL.WIDTH 2": "MODEL.WIDTH: was 1, now 2",
    "MODEL.DEPTH 3": "MODEL.DEPTH: was absent, now 3",
    "DATA_CONFIG.ROOT elsewhere": "DATA_CONFIG.ROOT: was data, now elsewhere",
    "CLASS_NAMES Car,Bus": "CLASS_NAMES: was [], now ['Car', 'Bus']",
}
REFUSED = {
    "SEED 7": "SEED: was 0, now 7",
    "TASK results_up:Down": "TASK: was results_up:Up, now results_up:Down",
    "OPTIMIZATION.BATCH_SIZE_PER_GPU 8": "OPTIMIZATION.BATCH_SIZE_PER_GPU: was 4, now 8",
    "OPTIMIZATION.ACCUMULATE 2": "OPTIMIZATION.ACCUMULATE: was 1, now 2",
    "OPTIMIZATION.OPTIMIZER sgd": "OPTIMIZATION.OPTIMIZER: was adamw, now sgd",
    "SCALE.VIRTUAL_WORKERS 2": "SCALE.VIRTUAL_WORKERS: was 1, now 2",
    "LOADER.SHUFFLE false": "LOADER.SHUFFLE: was True, now False",
}
ALL = {**TOLD, **REFUSED}
# Where and how fast it runs, and an evaluation's pictures, give no other result.
NOTHING = (
    *("LOADER.WORKERS 2", "LOADER.PREFETCH 4", "LOG.EVERY 3", "SCALE.HANG_TIMEOUT 5"),
    *("EVAL.PICTURES 2", "TUNE.NUM_SAMPLES 3"),
)


@pytest.mark.parametrize("words", TOLD)
def test_a_finished_run_tells_how_it_was_trained_otherwise_before_what_it_came_to(words: str, project: Project) -> None:
    with pytest.warns(UserWarning, match=re.escape(TOLD[words])):
        result = raytrain.train(project.config(*words.split()), quiet=True)
    assert result.changes == [f"config differs from the checkpoint's: {TOLD[words]}"]
    told, headline, remedy, weights, _ = result.lines()
    assert weights == f"  weights      {result.weights[:12]}"
    assert TOLD[words] in told and "--extra_tag NAME" in remedy and "--overwrite" in remedy
    assert headline.startswith("already complete, before these changes: all 2 epochs are trained  loss")


@pytest.mark.parametrize("words", REFUSED)
def test_a_finished_run_refuses_what_a_resume_refuses(words: str, project: Project) -> None:
    cfg = project.config(*words.split())
    with pytest.raises(ResumeError, match=re.escape(REFUSED[words])):
        raytrain.train(cfg, quiet=True)
    with pytest.warns(UserWarning, match=re.escape(REFUSED[words])):
        assert raytrain.train(cfg, quiet=True, allow_config_change=True).status == "complete"


@pytest.mark.parametrize("words", ["", *NOTHING])
def test_a_finished_run_has_nothing_to_say_where_its_result_is_the_same(words: str, project: Project) -> None:
    result = raytrain.train(project.config(*words.split()), quiet=True)
    assert result.status == "complete" and not result.changes and not result.notes
    assert result.lines()[0].startswith("already complete: all 2 epochs are trained  loss ")


def test_more_workers_than_a_finished_run_has_virtual_ones_are_told(project: Project) -> None:
    with pytest.warns(UserWarning, match="begun with 1 virtual worker and keeps that; a new one of 2 workers has 2"):
        assert raytrain.train(project.config("SCALE.NUM_WORKERS", "2"), quiet=True).status == "complete"


def test_the_command_and_python_show_it_on_the_screen(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg_file", str(project.yaml), "--set", "OPTIMIZATION.LR", "0.5"]) == 0
    command = capsys.readouterr().out
    raytrain.train(project.config("OPTIMIZATION.LR", "0.5"))
    assert capsys.readouterr().out == command
    first, second, *_ = command.splitlines()
    assert first == "  note: config differs from the checkpoint's: OPTIMIZATION.LR: was 0.1, now 0.5"
    assert second.startswith("already complete, before these changes")


# Another file


def test_another_yaml_of_the_same_name_is_told_with_the_remedy(project: Project) -> None:
    other = project.folder / "b" / "train.yaml"
    other.parent.mkdir(exist_ok=True)
    shutil.copy(project.yaml, other)
    (note,) = raytrain.train(load_config(other), quiet=True).notes
    assert f"begun by {project.yaml}, and this is {other}; if they are two projects" in note
    assert "--extra_tag NAME, or a TAG of its own" in note
    cfg = load_config(other, ["TASK", "results_up:Down"])
    for refuses in (lambda: raytrain.train(cfg, quiet=True), lambda: raytrain.evaluate(cfg)):
        with pytest.raises(ResumeError, match=f"(?s)results_up:Down.*\nnote: {re.escape(note)}$"):
            refuses()


def test_starting_over_in_a_namesakes_folder_says_whose_run_gives_way(tmp_path: Path, project: Project) -> None:
    other = tmp_path / "b" / "train.yaml"
    other.parent.mkdir()
    shutil.copy(project.yaml, other)
    shutil.copytree(project.folder / "output", tmp_path / "output")
    cfg, note = (
        load_config(other, ["OUTPUT", str(tmp_path / "output")]),
        f"begun by {project.yaml}, and this is {other}",
    )
    with pytest.raises(ResumeError, match=re.escape(note)):
        raytrain.train(cfg, quiet=True, resume="never")
    result = raytrain.train(cfg, quiet=True, resume="never", overwrite=True)
    assert result.status == "finished" and [note in line for line in notes(result.run_dir)] == [True]


def test_a_project_that_has_moved_is_told_in_one_line(project: Project) -> None:
    moved = project.folder / "moved" / "train.yaml"
    moved.parent.mkdir()
    project.yaml.rename(moved)
    try:
        result = raytrain.train(load_config(moved), quiet=True)
    finally:
        moved.rename(project.yaml)
    assert not result.changes and len(result.notes) == 1
    assert result.notes[0].endswith(f"{project.yaml}, which is not here: taken to be {moved}, moved")
    assert result.lines()[1].startswith("already complete: all 2 epochs")


@pytest.mark.parametrize("way", ["a link to its folder", "the run's own config.yaml", "a config without a file"])
def test_the_same_file_by_another_way_is_the_same(way: str, project: Project, tmp_path: Path) -> None:
    if way == "a link to its folder":
        (tmp_path / "link").symlink_to(project.yaml.parent)
        cfg = load_config(tmp_path / "link" / "train.yaml")
    elif way == "the run's own config.yaml":
        cfg = load_config(Path(project.result.run_dir) / "config.yaml")
    else:
        cfg = with_overrides(project.config(), ["CFG_FILE", ""])
    result = raytrain.train(cfg, quiet=True)
    assert (result.status, result.notes, result.changes) == ("complete", [], [])


# Other code


def test_code_that_has_changed_is_told_and_never_refused(project: Project) -> None:
    project.slope.write_text("SLOPE = -3.0\n")
    try:
        with pytest.warns(UserWarning, match="task's code differs from the checkpoint's: results_up_slope.py has chan"):
            result = raytrain.train(project.config(), quiet=True)
    finally:
        project.slope.write_text("SLOPE = 3.0\n")
    assert result.status == "complete" and result.lines()[1].startswith("already complete, before these changes")


def test_a_run_that_goes_on_tells_code_and_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    project = project_in(tmp_path, "results_on")
    project.slope.write_text("SLOPE = -3.0\n")
    moved = project.yaml.with_name("run.yaml")
    project.yaml.rename(moved)
    for epochs in ("3", "4"):
        result = raytrain.train(load_config(moved, ["TAG", "train", "OPTIMIZATION.NUM_EPOCHS", epochs]), quiet=True)
        assert (result.status, result.epochs) == ("finished", int(epochs))
    told = [note for note in notes(result.run_dir) if "results_on_slope.py has changed" in note or "moved" in note]
    assert len(told) == 2 and told[0].startswith("the task's code differs") and told[1].endswith(f"{moved}, moved")


# Evaluations


@pytest.mark.parametrize("words", [w for w in (*ALL, *NOTHING[1:]) if "TASK" not in w])
def test_an_evaluation_tells_what_it_follows_from(words: str, project: Project) -> None:
    decides = words.startswith(("SEED", "MODEL", "DATA_CONFIG", "CLASS_NAMES"))
    told = [f"config differs from the checkpoint's: {ALL[words]}"] if decides else []
    assert raytrain.evaluate(project.config(*words.split())).notes == told


def test_an_evaluation_of_another_task_is_refused_unless_its_checkpoint_is_named(project: Project) -> None:
    cfg = project.config("TASK", "results_up:Down")
    with pytest.raises(ResumeError, match=r"made by TASK results_up:Up, and this config has results_up:Down\..*--ckpt"):
        raytrain.evaluate(cfg)
    assert project.result.checkpoint is not None
    named = raytrain.evaluate(cfg, ckpt=Path(project.result.checkpoint))
    assert named.notes == [f"config differs from the checkpoint's: {REFUSED['TASK results_up:Down']}"]


# Under torchrun


@pytest.mark.ray
def test_torchrun_tells_it_once_and_names_a_rank_that_runs_other_code(tmp_path: Path) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        (tmp_path / rank / "rank_code.py").write_text(CODE.format(name="rank_code") + f"# as on host {rank}\n")
        (tmp_path / rank / "rank_code_slope.py").write_text("SLOPE = 3.0\n")
    yaml = tmp_path / "train.yaml"
    yaml.write_text(YAML.format(name="rank_code", output=tmp_path / "output"))
    code = f"import os, sys; sys.path.insert(0, {str(tmp_path)!r} + '/' + os.environ['RANK']); "
    words = ["-c", f"{code}from raytrain.cli import main; sys.exit(main())", "train", "--cfg_file", str(yaml)]
    torchrun(words, tmp_path).ended(0)
    told = [note for note in notes(tmp_path / "output/train/default") if "code" in note]
    assert told == ["the task's code on rank 1 differs from rank 0's: rank_code.py has changed"]
    out = torchrun([*words, "--set", "OPTIMIZATION.LR", "0.7"], tmp_path).ended(0)
    assert out.count("OPTIMIZATION.LR: was 0.1, now 0.7") == out.count("already complete, before these changes") == 1
