"""A task's pictures on their way to the run folder and TensorBoard, and what happens where there can be none."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import bad_tasks
import pytest
import s3_server
from tasks_that_draw import Endless, png
from tensorboard_events import events_of

import raytrain
from raytrain import cli
from raytrain.config.sections import Config
from raytrain.errors import TaskError, TrainingError
from raytrain.journal.records import read_journal
from raytrain.storage.storage import open_storage
from raytrain.training.contract import pictures_of
from raytrain.training.evaluate import view
from raytrain.training.pictures import why_not_drawn


def config(output: Path | str, task: str, **sections: Any) -> Config:
    tree = {
        "TASK": f"{'bad_tasks' if task == 'Good' else 'tasks_that_draw'}:{task}",
        "OUTPUT": str(output),
        "OPTIMIZATION": {"BATCH_SIZE_PER_GPU": 4, "NUM_EPOCHS": 2},
        "SCALE": {"NUM_WORKERS": 0, "USE_GPU": False},
        "LOADER": {"WORKERS": 0},
        **sections,
    }
    return Config.model_validate(tree)


def kinds(run_dir: str, *wanted: str) -> list[dict[str, Any]]:
    return read_journal(open_storage(run_dir), kinds=wanted)


def images(folder: Path) -> dict[str, list[tuple[int, int, int, bytes]]]:
    """Tag -> (x, width, height, file) of each image, as tensorboard reads them."""
    events = events_of(folder, "images")
    found = {tag: events.Images(tag) for tag in events.Tags()["images"]}
    return {tag: [(e.step, e.width, e.height, e.encoded_image_string) for e in each] for tag, each in found.items()}


# At the first evaluation and at the end of training


@pytest.mark.ray
def test_pictures_of_the_first_and_last_evaluation_are_in_the_run_folder_and_in_tensorboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first show early what is wrong with data or drawing; those between would be many."""
    result = raytrain.train(config(tmp_path, "Drawing", OPTIMIZATION={"BATCH_SIZE_PER_GPU": 4, "NUM_EPOCHS": 3}))
    run = Path(result.run_dir)
    names = [f"sample_{index}" for index in range(4)]
    files = sorted(run.glob("eval/**/*.png"))
    assert files == [run / f"eval/epoch_{epoch}/val/pictures/{name}.png" for epoch in (1, 3) for name in names]
    assert {file.read_bytes() for file in files} == {png(6)}  # all six predictions were there
    assert images(run / "tensorboard/eval") == {
        f"pictures/{name}": [(epoch, 3, 2, png(6)) for epoch in (1, 3)] for name in names
    }
    records = [(record["folder"], record["names"], record["step"]) for record in kinds(result.run_dir, "pictures")]
    assert records == [(f"eval/epoch_{epoch}/val/pictures", names, 3 * epoch) for epoch in (1, 3)]
    assert f"  pictures     {files[-1].parent}\n" in capsys.readouterr().out
    assert f"Drew eval/epoch_3/val/pictures: {', '.join(names)}" in next(run.glob("train_*.log")).read_text()


@pytest.mark.ray
def test_pictures_come_to_a_run_folder_behind_a_uri(tmp_path: Path) -> None:
    with s3_server.serving() as server:
        cfg = config(server.uri("bucket/output"), "Drawing", EVAL={"PICTURES": 1})
        result = raytrain.train(cfg, quiet=True)
        assert open_storage(result.run_dir).read_bytes("eval/epoch_2/val/pictures/sample_0.png") == png(6)
        events = [key for key in server.objects if "tensorboard/eval" in key]
        copy = tmp_path / "eval" / Path(events[0]).name
        copy.parent.mkdir()
        with server.filesystem().open_input_stream(events[0]) as stream:
            copy.write_bytes(stream.read())
    assert images(copy.parent) == {"pictures/sample_0": [(epoch, 3, 2, png(6)) for epoch in (1, 2)]}


@pytest.mark.ray
@pytest.mark.parametrize(("task", "section"), [("Drawing", {"PICTURES": 0}), ("Good", {})])
def test_none_are_drawn_where_none_are_wished_or_the_task_has_none(
    task: str, section: dict[str, int], tmp_path: Path
) -> None:
    result = raytrain.train(config(tmp_path, task, EVAL=section), quiet=True)
    assert result.status == "finished"
    assert not list(tmp_path.rglob("*.png"))
    assert not kinds(result.run_dir, "pictures", "event")


def test_a_picture_that_fails_is_a_warning_of_a_finished_run(tmp_path: Path) -> None:
    result = raytrain.train(config(tmp_path, "Raises"), quiet=True)
    assert result.status == "finished"
    (warning,) = kinds(result.run_dir, "event")
    log = Path(result.run_dir) / "logs" / "rank_0.log"
    assert warning["event"] == "warning"
    assert warning["message"] == (
        f"no pictures: Raises.pictures failed: ZeroDivisionError: no width (traceback in {log})"
    )
    assert "in pictures" in log.read_text()
    assert kinds(result.run_dir, "end")[0]["status"] == "finished"
    assert raytrain.train(config(tmp_path, "Raises"), quiet=True).status == "complete"


def test_a_failure_told_in_many_lines_is_one_line_of_the_journal() -> None:
    task = bad_tasks.Good.__new__(bad_tasks.Good)
    told = why_not_drawn(ValueError("no\n  width" + 999 * "!"), task, "s3://bucket/run")
    assert told.startswith("no pictures: Good.pictures failed: ValueError: no width!!!")
    assert "\n" not in told and len(told) < 300


def test_a_missing_package_is_one_note_that_says_how_to_get_it(tmp_path: Path) -> None:
    result = raytrain.train(config(tmp_path, "Lacking"), quiet=True)
    (warning,) = kinds(result.run_dir, "event")
    assert warning["message"] == 'no pictures: get it with: pip install "raytrain[pictures]"'


# raytrain eval


def test_an_evaluation_writes_pictures_beside_its_metrics(tmp_path: Path) -> None:
    cfg = config(tmp_path, "Drawing", EVAL={"PICTURES": 2})
    raytrain.train(cfg, quiet=True)
    found = raytrain.evaluate(cfg, eval_tag="again")
    assert found.pictures == f"{found.folder}/pictures" and found.warning is None
    assert {path.name for path in Path(found.pictures).iterdir()} == {"sample_0.png", "sample_1.png"}


def test_an_evaluation_whose_pictures_fail_has_its_metrics_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raytrain.train(config(tmp_path / "output", "Raises"), quiet=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(raytrain.config.load.dump_config(config("output", "Raises")))
    assert cli.main(shlex.split("eval --cfg_file run.yaml")) == 0
    said = capsys.readouterr()
    assert "results" in said.out and "pictures" not in said.out
    assert said.err.startswith("warning: no pictures: Raises.pictures failed: ZeroDivisionError: no width")


# raytrain view


def test_a_view_without_a_checkpoint_shows_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(raytrain.config.load.dump_config(config(tmp_path, "Drawing")))
    assert cli.main(shlex.split("view --cfg_file run.yaml --count 2")) == 0
    paths = [tmp_path / f"run/default/view/data/sample_{index}.png" for index in range(2)]
    assert capsys.readouterr().out.split("\n") == ["no checkpoint: the data alone", *(f"  {p}" for p in paths), ""]
    assert [path.read_bytes() for path in paths] == [png(0), png(0)]


@pytest.mark.ray
def test_a_view_with_a_checkpoint_predicts_no_more_than_it_shows(tmp_path: Path) -> None:
    cfg = config(tmp_path, "Drawing")
    result = raytrain.train(cfg, quiet=True)
    seen = view(cfg, count=5)
    assert seen.checkpoint == result.checkpoint
    assert [Path(path).relative_to(result.run_dir).as_posix() for path in seen.pictures] == [
        f"view/epoch_2/sample_{index}.png" for index in range(5)
    ]
    assert {Path(path).read_bytes() for path in seen.pictures} == {png(5)}
    assert len(view(cfg, result.checkpoint, count=100).pictures) == 6  # samples there are
    assert len(view(config(tmp_path, "Drawing", EVAL={"PICTURES": 0})).pictures) == 4


def test_a_view_of_a_task_without_pictures_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"bad_tasks:Good draws no pictures; write Good.pictures\(predictions"):
        view(config(tmp_path, "Good"))


def test_a_view_that_fails_is_an_error_with_the_users_traceback(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"Drawing failed on rank 0[\s\S]*in pictures[\s\S]*no width"):
        view(config(tmp_path, "Raises"))


# What a task may give


def test_no_more_pictures_are_taken_than_were_asked_for(tmp_path: Path) -> None:
    task = Endless(config(tmp_path, "Endless"))
    assert len(list(pictures_of(task, [], bad_tasks.Points(9), 3, 0, 0))) == 3


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (None, "gave NoneType; write it as a generator"),
        (["a.png"], "gave str 'a.png'; yield name, png_bytes"),
        ([("a/b", png(0))], "named a picture 'a/b'; use letters"),
        ([("..", png(0))], "named a picture '..'; use letters"),
        ([("a", b"GIF89a")], "gave bytes b'GIF89a' as picture a; give a PNG file's bytes"),
        ([("a", png(0)[:20])], "as picture a; give a PNG file's bytes"),
        ([("a", png(0)), ("a", png(1))], "named two pictures a; name each for its sample"),
    ],
)
def test_what_is_no_picture_is_named(given: Any, told: str, tmp_path: Path) -> None:
    class Wrong(bad_tasks.Good):
        def pictures(self, predictions: list[Any], dataset: Any, count: int) -> Any:
            return given

    with pytest.raises(TaskError) as raised:
        list(pictures_of(Wrong(config(tmp_path, "Good")), [], bad_tasks.Points(2), 4, 0, 0))
    assert told in str(raised.value)
