"""OpenPCDetTask on a small package that has pcdet's surface and its habits (tests/support/pcdet_like)."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import small_runs
import torch
from commands import commanded

from raytrain.config.load import load_config
from raytrain.config.sections import Config
from raytrain.errors import TaskError
from raytrain.progress import TaskProgress
from raytrain.tasks.openpcdet import OpenPCDetTask, adapted
from raytrain.tasks.openpcdet.checkout import find_checkout


def write_data(checkout: Path, num_frames: int = 8) -> None:
    for split in ("train", "val"):
        frames = [{"frame_id": f"{n:03d}", "boxes": np.full((n % 3, 7), 1.0) + n} for n in range(num_frames)]
        (checkout / f"data/dots/dots_infos_{split}.pkl").write_bytes(pickle.dumps(frames))


def config(checkout: Path, output: Path, *words: str) -> Config:
    write_data(checkout)
    fixed = ("SCALE.NUM_WORKERS", "0", "SCALE.USE_GPU", "false", "OUTPUT", str(output), "LOADER.WORKERS", "0")
    return load_config(checkout / "tools/cfgs/dots_models/dots.yaml", [*fixed, *words])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.ray
def test_a_config_as_it_is_trains_is_evaluated_and_goes_on_to_the_same_bits(checkout: Path, tmp_path: Path) -> None:
    cfg = config(checkout, tmp_path / "straight")
    straight = small_runs.train(cfg)
    weights = small_runs.saved_state(straight.checkpoint)
    (last,) = small_runs.journal(straight.run_dir, "eval")
    assert last["metrics"] == {"recall/roi_0.5": 0, "recall/rcnn_0.5": 0.5, "dots": 5}
    assert "dots found: all" in str(small_runs.journal(straight.run_dir, "event"))
    assert int(weights["global_step"]) == 12, "each step counts, as in pcdet's own loop"

    half = config(checkout, tmp_path / "stopped")
    small_runs.run_until(half, stop_at=5)
    assert same(weights, small_runs.saved_state(small_runs.train(half).checkpoint))


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_loader_workers_makes_the_same_samples(checkout: Path, tmp_path: Path, workers: int) -> None:
    """Of samplers that walk through a list from where the last sample of the same process has left it."""
    none = small_runs.train(config(checkout, tmp_path / "0"))
    some = small_runs.train(config(checkout, tmp_path / "some", "LOADER.WORKERS", str(workers)))
    assert same(*(small_runs.saved_state(run.checkpoint) for run in (none, some)))


@pytest.mark.ray
def test_two_workers_of_ray_train_and_evaluate_it(checkout: Path, tmp_path: Path) -> None:
    write_data(checkout)
    yaml = "cfgs/dots_models/dots.yaml"
    words = ["train", "--cfg_file", yaml, "--num_workers", "2", "--no_gpu", "--output", str(tmp_path), "--workers", "1"]
    commanded(words, checkout / "tools").ended(0)
    (run_dir,) = tmp_path.glob("dots_models/dots/default")
    (last,) = small_runs.journal(run_dir, "eval")
    assert last["metrics"]["dots"] == 5


def test_samples_do_not_depend_on_those_before_and_the_hook_leaves_out_augmentors(
    checkout: Path, tmp_path: Path
) -> None:
    frames = OpenPCDetTask(config(checkout, tmp_path)).build_dataset("train")
    assert len(frames) == 8

    def sample(index: int) -> np.ndarray:
        np.random.seed(index)
        return frames[index]["gt_boxes"]

    first = sample(4)
    for index in (1, 2, 5):
        sample(index)
    assert np.array_equal(sample(4), first)
    assert len(sample(3)) > 2, "a frame without boxes gives another, drawn by its key"
    frames.set_epoch(1)
    assert len(sample(4)) == 1 + 2
    frames.set_epoch(2)
    assert len(sample(4)) == 1, "gt_sampling is left out in the last epoch"
    again = pickle.loads(pickle.dumps(frames))
    again.set_epoch(0)
    np.random.seed(4)
    assert np.array_equal(again[4]["gt_boxes"], first), "also where the generator of voxels was made before"


def test_batches_have_the_types_that_their_models_want(checkout: Path, tmp_path: Path) -> None:
    task = OpenPCDetTask(config(checkout, tmp_path))
    frames = task.build_dataset("val")
    batch = task.collate([frames[1], frames[2]])
    assert batch["points"].dtype == batch["gt_boxes"].dtype == torch.float32
    assert batch["image_shape"].dtype == torch.int32
    assert batch["frame_id"].tolist() == ["001", "002"] and batch["batch_size"] == 2


def test_shared_memory_is_left_alone_and_that_is_told(checkout: Path, tmp_path: Path) -> None:
    task = OpenPCDetTask(config(checkout, tmp_path))
    task.build_dataset("train")
    assert any("USE_SHARED_MEMORY of gt_sampling has no effect" in note for note in task.take_notes())


def test_what_the_evaluation_writes_is_kept_in_the_run_folder(checkout: Path, tmp_path: Path) -> None:
    task = OpenPCDetTask(config(checkout, tmp_path))
    frames = task.build_dataset("val")
    task.take_progress(TaskProgress(3, 9, 1.0))
    model = task.build_model(frames).eval()
    found = [each for n in range(8) for each in task.predict(model, task.collate([frames[n]]))]
    task.score(found, frames)
    folder = tmp_path / "dots_models/dots/default/eval/epoch_3/val/default"
    assert len(pickle.loads((folder / "result.pkl").read_bytes())) == 8
    assert (folder / "dots.txt").read_text() == "found"


def test_without_data_it_says_where_it_was_looked_for_and_what_makes_it(checkout: Path, tmp_path: Path) -> None:
    task = OpenPCDetTask(config(checkout, tmp_path))
    for file in (checkout / "data/dots").iterdir():
        file.unlink()
    with pytest.raises(TaskError, match=r"no frame for 'train' in .*data/dots.*make its tables"):
        task.build_dataset("train")


def test_a_data_set_that_is_unknown_or_cannot_be_imported_is_told(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="DATASET is Nothing; pcdet has DotsDataset, BrokenDataset"):
        OpenPCDetTask(config(checkout, tmp_path, "DATA_CONFIG.DATASET", "Nothing")).build_dataset("train")
    with pytest.raises(ImportError, match="No module named 'a_package_that_nobody_has'"):
        OpenPCDetTask(config(checkout, tmp_path, "DATA_CONFIG.DATASET", "BrokenDataset")).build_dataset("train")


def test_without_pcdet_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pcdet", raising=False)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if not (Path(each) / "pcdet").is_dir()])
    with pytest.raises(TaskError, match=r"none of the folders above .*x.yaml has a pcdet/__init__.py.*--task pointp"):
        find_checkout(str(tmp_path / "x.yaml"))


def test_source_is_changed_where_pcdet_is_imported_and_nowhere_else(checkout: Path, tmp_path: Path) -> None:
    OpenPCDetTask(config(checkout, tmp_path)).build_dataset("train")  # whose code says np.float
    assert not hasattr(np, "float")
    with pytest.raises(AttributeError, match="fo_bar"):
        adapted.finder().cuda.fo_bar  # noqa: B018
    assert adapted.finder() is adapted.finder()
