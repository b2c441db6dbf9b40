"""The last batch of an epoch: kept, dropped or padded; and one of one sample, which BatchNorm cannot take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Pair
from small_runs import config, journal, notes, run_until, saved_state, train

from raytrain.config.sections import Config
from raytrain.engine.state import build_run
from raytrain.engine.world import World
from raytrain.errors import ConfigError, ResumeError, TaskError
from raytrain.task import load_task_class
from raytrain.training.last_batch import refuse_lone_sample
from raytrain.training.worker import plan_of


def cfg_of(folder: Path, size: int, model: str = "flat", **keys: Any) -> Config:
    """A run of tasks_for_means.Normed over `size` samples. keys: of OPTIMIZATION, but LAST and VIRTUAL_WORKERS."""
    loader = {"WORKERS": 0, "LAST": keys.pop("LAST", "keep")}
    scale = {"NUM_WORKERS": 0, "USE_GPU": False, "VIRTUAL_WORKERS": keys.pop("VIRTUAL_WORKERS", None)}
    optim = {"BATCH_SIZE_PER_GPU": 4, "NUM_EPOCHS": 2, "LR": 0.01, **keys}
    cfg = config(
        folder, "PointsTask", optim, LOADER=loader, SCALE=scale, DATA_CONFIG={"SIZE": size}, MODEL={"KIND": model}
    )
    return Config.model_validate({**cfg.to_tree(), "TASK": "tasks_for_means:Normed"})


REFUSED: dict[str, tuple[int, str, dict[str, Any], str]] = {
    "a vector": (9, "flat", {}, "9 samples in batches of 4 end with a batch of one"),
    "a pooled image": (13, "pooled", {}, "13 samples in batches of 4 end with a batch of one"),
    "deep inside": (9, "deep", {}, "of which BatchNorm 'inner.0.norm' gets one value per channel"),
    "accumulated": (17, "flat", {"ACCUMULATE": 4}, "17 samples in batches of 4 end with a batch of one"),
    "virtual workers": (10, "flat", {"VIRTUAL_WORKERS": 2}, "10 samples for 2 virtual workers in batches of 4 end"),
    "padded shares": (9, "flat", {"VIRTUAL_WORKERS": 2}, "9 samples for 2 virtual workers in batches of 4 end"),
    "one sample": (1, "flat", {}, "1 samples in batches of 4 end with a batch of one"),
    "batches of one": (8, "flat", {"BATCH_SIZE_PER_GPU": 1}, "8 samples in batches of 1 are batches of one"),
    "ddp": (9, "flat", {"ENGINE": "ddp"}, "9 samples in batches of 4 end with a batch of one"),
    "pad is of no use": (8, "flat", {"BATCH_SIZE_PER_GPU": 1, "LAST": "pad"}, "are batches of one"),
}


@pytest.mark.parametrize(("size", "model", "keys", "told"), REFUSED.values(), ids=REFUSED)
def test_a_last_batch_of_one_with_batchnorm_is_refused_before_the_first_step(
    size: int, model: str, keys: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(TaskError) as caught:
        train(cfg_of(tmp_path, size, model, **keys))
    assert told in str(caught.value) and "Set LOADER.LAST: drop (or pad), or another OPTIMIZATION" in str(caught.value)
    [run_dir] = {path.parent for path in tmp_path.rglob("journal.jsonl")}
    assert journal(run_dir, "step") == [] and not list(run_dir.glob("ckpt/checkpoint*"))


TRAINED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "no lone sample": (10, "flat", {}),
    "many pixels": (9, "pixels", {}),
    "many points": (9, "points", {}),
    "another norm": (9, "group", {}),
    "another batch size": (9, "flat", {"BATCH_SIZE_PER_GPU": 3}),
    "drop": (9, "flat", {"LAST": "drop"}),
    "pad": (9, "flat", {"LAST": "pad"}),
    "pad, virtual workers": (9, "flat", {"LAST": "pad", "VIRTUAL_WORKERS": 2}),
    "drop, virtual workers": (17, "flat", {"LAST": "drop", "VIRTUAL_WORKERS": 2}),
}


@pytest.mark.parametrize(("size", "model", "keys"), TRAINED.values(), ids=TRAINED)
def test_others_train_to_the_end(size: int, model: str, keys: dict[str, Any], tmp_path: Path) -> None:
    assert train(cfg_of(tmp_path, size, model, **keys)).status == "finished"


def lone_sample_told(rank: int, sync_bn: bool) -> str:
    """Of a run over two processes whose last micro-batch is one sample on each."""
    cfg = cfg_of(Path("unused"), 10, SYNC_BN=sync_bn)
    world, task = World(rank, 2, 2), load_task_class(cfg.TASK)(cfg)
    run = build_run(cfg, task, None, plan_of(cfg, 10, world), world)
    refuse_lone_sample(run)
    try:
        run.model(torch.randn(4, 3))
    except TaskError as error:
        return str(error)
    return "trains"


def test_synchronised_batchnorm_takes_the_samples_of_all_processes(pair: Pair) -> None:
    assert pair.run(lone_sample_told, True) == ["trains"] * 2
    assert all("end with a batch of one" in told for told in pair.run(lone_sample_told, False))


# keep, drop, pad


@pytest.mark.parametrize(
    ("last", "steps", "samples", "note"),
    [
        ("keep", 3, [8, 8, 4], None),
        (
            "drop",
            2,
            [8, 8],
            "LOADER.LAST is drop: the last 3 of 19 samples of an epoch, others in each order, are left out",
        ),
        (
            "pad",
            3,
            [8, 8, 8],
            "LOADER.LAST is pad: the last batch is filled up with the first 5 of 19 samples of an epoch",
        ),
    ],
)
def test_the_last_batch_is_what_the_config_says_and_that_is_told(
    last: str, steps: int, samples: list[int], note: str | None, tmp_path: Path
) -> None:
    result = train(cfg_of(tmp_path, 19, "group", LAST=last, VIRTUAL_WORKERS=2))
    assert [step["samples"] for step in journal(result.run_dir, "step")] == samples * 2
    assert journal(result.run_dir, "run")[0]["steps_per_epoch"] == steps
    assert [each for each in notes(result.run_dir) if "LOADER.LAST" in each] == ([note] if note else [])


@pytest.mark.parametrize("last", ["drop", "pad"])
@pytest.mark.parametrize("stop_at", [1, 2])
def test_a_run_that_is_stopped_and_goes_on_takes_the_same_steps(last: str, stop_at: int, tmp_path: Path) -> None:
    cfg = cfg_of(tmp_path / "stopped", 19, LAST=last, VIRTUAL_WORKERS=2)
    run_until(cfg, stop_at=stop_at)
    results = [train(each) for each in (cfg, cfg_of(tmp_path / "whole", 19, LAST=last, VIRTUAL_WORKERS=2))]
    torch.testing.assert_close(*(saved_state(result.checkpoint) for result in results), rtol=0, atol=0)
    stopped, whole = ([s["samples"] for s in journal(result.run_dir, "step")] for result in results)
    assert stopped == whole


def test_another_choice_is_refused_when_a_run_goes_on_unless_one_insists(tmp_path: Path) -> None:
    run_until(cfg_of(tmp_path, 19, "group"), stop_at=2)
    other = cfg_of(tmp_path, 19, "group", LAST="drop")
    with pytest.raises(ResumeError, match=r"LOADER.LAST: was keep, now drop \(steps and schedule would no longer"):
        train(other)
    result = train(other, allow_config_change=True)
    assert result.status == "finished" and journal(result.run_dir, "step")[-1]["step"] == 8


def test_to_drop_all_there_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 samples are not one whole batch of 4 for each of 1 virtual workers"):
        train(cfg_of(tmp_path, 3, LAST="drop"))
