"""A user's own task in a file of theirs, which is no part of any package, trains everywhere."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from commands import Launched

pytestmark = pytest.mark.ray

TASK = """
import numpy as np
import torch
from torch import nn

import raytrain
from shop_parts import scale  # another file of theirs, beside this one


class Readings(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        x, y = self.rows[i]
        return np.float32([scale(x) + np.random.normal(0, 0.01)]), np.float32([y])


class ShopTask(raytrain.Task):
    def build_dataset(self, split):
        rows = np.loadtxt(self.cfg.DATA_CONFIG.FILE)  # relative to where the command is given
        return Readings(rows[::2] if split == "train" else rows[1::2])

    def build_model(self, dataset):
        return nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))

    def model_func(self, model, batch):
        x, y = batch
        return raytrain.ModelReturn(nn.functional.mse_loss(model(x), y))
"""
CONFIG = """
TASK: shop_task:ShopTask
DATA_CONFIG: {FILE: data/readings.txt}
OPTIMIZATION: {BATCH_SIZE_PER_GPU: 4, NUM_EPOCHS: 2}
SCALE: {USE_GPU: false}
LOADER: {WORKERS: 2}
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A user's folder: a task, a module that it needs, data, and a config."""
    (tmp_path / "shop_task.py").write_text(TASK)
    (tmp_path / "shop_parts.py").write_text("def scale(x):\n    return x / 16\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "readings.txt").write_text("".join(f"{i} {2 * i}\n" for i in range(32)))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "shop.yaml").write_text(CONFIG)
    return tmp_path


def test_a_users_own_task_trains_in_process(shop: Path) -> None:
    said = command(shop, "--num_workers", "0").ended(0)
    assert "finished after epoch 2" in said
    assert (shop / "output" / "shop" / "default" / "ckpt" / "checkpoint_epoch_2" / "manifest.json").exists()


def test_a_users_own_task_trains_on_a_cluster_that_was_started_elsewhere(shop: Path, ray_address: str) -> None:
    said = command(shop, "--num_workers", "2", "--address", ray_address).ended(0)
    assert "finished after epoch 2" in said
    assert (shop / "output" / "shop" / "default" / "ckpt" / "checkpoint_epoch_2" / "manifest.json").exists()


def command(shop: Path, *flags: str) -> Launched:
    """`raytrain train` as typed in the user's folder, without any help from the environment."""
    installed = shutil.which("raytrain", path=str(Path(sys.executable).parent))
    assert installed, "the package is installed with its command"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return Launched.of([installed, "train", "--cfg_file", "configs/shop.yaml", *flags], shop, env)
