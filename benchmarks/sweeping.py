"""The processes that sweep.py times beside `raytrain tune`: `python -m benchmarks.sweeping bare|ray FOLDER`.

bare: each trial in this process, one after another, by raytrain.train.
ray:  Ray Tune as its documentation has it for Ray Train ("Hyperparameter Tuning with Ray Tune"): a function that makes
      a TorchTrainer, whose training function is the hand-written loop; as there, each epoch reports a checkpoint.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import ray.tune
import torch
import yaml
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from raytrain import Config, train
from raytrain.config.load import load_config, with_values
from raytrain.tasks.digits import DigitsTask

LRS = (0.001, 0.003, 0.01, 0.03)
CLIPS = (0.3, 1.0, 10.0, 100.0)
SWEPT = ("OPTIMIZATION.LR", "OPTIMIZATION.GRAD_NORM_CLIP")
CONFIG, TOLD = "sweep.yaml", "told.json"
PREPARES = {"CPU": 0.01}  # of Tune: two trials that reserve a core each leave none for their workers, and wait for ever


def bare(folder: Path) -> dict[str, Any]:
    """Seconds of each trial. A first, short one, which is not counted, imports all there is to import."""
    cfg = with_values(load_config(folder / CONFIG), {"TUNE": {}, "SCALE.VIRTUAL_WORKERS": 1})
    trained_s(cfg, "warm", {"OPTIMIZATION.NUM_EPOCHS": 1})
    points = [dict(zip(SWEPT, point, strict=True)) for point in points_of(folder)]
    return {"trials_s": [trained_s(cfg, f"bare_{i}", point) for i, point in enumerate(points)]}


def points_of(folder: Path) -> list[tuple[float, float]]:
    """(LR, GRAD_NORM_CLIP) of each trial."""
    space = load_config(folder / CONFIG).to_tree()["TUNE"]["SPACE"]
    return list(itertools.product(*(space[key]["grid"] for key in SWEPT)))


def trained_s(cfg: Config, name: str, values: dict[str, Any]) -> float:
    began = time.perf_counter()
    train(with_values(cfg, {**values, "EXTRA_TAG": name}), num_workers=0, quiet=True)
    return time.perf_counter() - began


def train_func(config: dict[str, Any]) -> None:
    """What the worker of a trial runs."""
    cfg = Config.model_validate(config["cfg"])
    torch.set_num_threads(1)
    task = DigitsTask(cfg)
    train_set, val_set = task.build_dataset("train"), task.build_dataset("val")
    model: Any = ray.train.torch.prepare_model(task.build_model(train_set))
    optim_cfg = cfg.OPTIMIZATION
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=optim_cfg.WEIGHT_DECAY)
    batch_size = optim_cfg.BATCH_SIZE_PER_GPU
    loader = ray.train.torch.prepare_data_loader(DataLoader(train_set, batch_size, shuffle=True))
    val_loader = ray.train.torch.prepare_data_loader(DataLoader(val_set, batch_size))
    for _ in range(optim_cfg.NUM_EPOCHS):
        model.train()
        for batch in loader:
            loss = cross_entropy(model(batch["image"]), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
            optimizer.step()
        model.eval()
        with torch.no_grad():
            hits = sum(int((model(each["image"]).argmax(dim=1) == each["label"]).sum()) for each in val_loader)
        with tempfile.TemporaryDirectory() as made:
            torch.save(model.state_dict(), os.path.join(made, "model.pt"))  # noqa: PTH118 (as documented)
            ray.train.report({"accuracy": hits / len(val_set)}, checkpoint=Checkpoint.from_directory(made))


def trial_func(config: dict[str, Any], folder: str) -> None:
    """What Tune runs for a trial."""
    trainer = TorchTrainer(
        train_func,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(
            name=f"train-{ray.tune.get_context().get_trial_id()}",
            storage_path=folder,
            callbacks=[TuneReportCallback()],
        ),
    )
    trainer.fit()


def by_ray_tune(folder: Path, num_trials: int, concurrent: int) -> dict[str, Any]:
    """When Tune began and ended, by time.time()."""
    cfg = with_values(load_config(folder / CONFIG), {"TUNE": {}})
    points = [{"lr": lr, "clip": clip, "cfg": cfg.to_tree()} for lr, clip in points_of(folder)[:num_trials]]
    ray.init(num_cpus=concurrent)
    function = functools.partial(trial_func, folder=str(folder / "ray_results"))
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(function, PREPARES),
        param_space=ray.tune.grid_search(points),  # type: ignore[arg-type]
        tune_config=ray.tune.TuneConfig(max_concurrent_trials=concurrent),
        run_config=ray.tune.RunConfig(name="idiom", storage_path=str(folder / "ray_results")),
    )
    began = time.time()
    results = tuner.fit()
    accuracies = [result.metrics["accuracy"] for result in results if result.metrics and not result.error]
    if len(accuracies) < num_trials:
        raise SystemExit(f"only {len(accuracies)} of {num_trials} trials were trained")
    return {"began": began, "ended": time.time(), "accuracies": accuracies}


def main() -> None:
    way, folder = sys.argv[1], Path(sys.argv[2])
    found = bare(folder) if way == "bare" else by_ray_tune(folder, int(sys.argv[3]), int(sys.argv[4]))
    (folder / TOLD).write_text(json.dumps(found))


def config_of(folder: Path, epochs: int, per_axis: int, concurrent: int) -> Path:
    """The sweep's YAML, written to `folder`: the digits example, at the first `per_axis` of LRS and of CLIPS."""
    root = Path(__file__).parents[1]
    config = {
        "_BASE_CONFIG_": str(root / "configs" / "digits.yaml"),
        "OUTPUT": str(folder / "output"),
        "OPTIMIZATION": {"NUM_EPOCHS": epochs},
        "SCALE": {"NUM_WORKERS": 1},
        "TUNE": {
            "SPACE": {key: {"grid": list(values[:per_axis])} for key, values in zip(SWEPT, (LRS, CLIPS), strict=True)},
            "METRIC": "accuracy",
            "MODE": "max",
            "SEARCH": "grid",
            "SCHEDULER": "none",
            "CONCURRENT": concurrent,
        },
    }
    path = folder / CONFIG
    path.write_text(yaml.safe_dump(config))
    return path


if __name__ == "__main__":
    main()
