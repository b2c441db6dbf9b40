"""What the command's environment says holds in workers elsewhere, or is told: on the cluster of RAY_ADDRESS, in trials
of a sweep there, under torchrun, with loader workers and without."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from commands import commanded, torchrun

from raytrain.journal.records import read_journal
from raytrain.storage.storage import open_storage

pytestmark = pytest.mark.ray

TASK = """
import os
import torch
from raytrain import ModelReturn, Task

SIZE = int(os.environ.get("REGION_SIZE", "8"))  # as the module is imported


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return SIZE

    def __getitem__(self, i):
        assert os.environ["REGION_SCALE"] == "4", "as a sample is made"
        return torch.full([1], i / SIZE)


class Region(Task):
    def build_dataset(self, split):
        os.getenv("REGION_LABEL")
        return Rows()

    def build_model(self, dataset):
        return torch.nn.Linear(1, 1)

    def model_func(self, model, batch):
        return ModelReturn(model(batch).square().mean())
"""
CONFIG = """
TASK: region:Region
OPTIMIZATION: {BATCH_SIZE_PER_GPU: 16, NUM_EPOCHS: 1}
SCALE: {NUM_WORKERS: 2, USE_GPU: false, ENV: [REGION_SIZE, "REGION_SC*", REGION_UNSET]}
TUNE: {SPACE: {OPTIMIZATION.LR: {grid: [0.01]}}, SEARCH: grid, METRIC: loss, MODE: min}
"""
VARIABLES = {"REGION_SIZE": "96", "REGION_SCALE": "4", "REGION_LABEL": "a-secret"}
DIFFERS = "the task reads variables that workers do not have as the command has them: REGION_LABEL (region.py; "
# Rank 1 as on a host that knows nothing of them.
ELSEWHERE = f"""
import os
if os.environ["RANK"] == "0":
    os.environ.update({VARIABLES!r})
from raytrain.cli import main
exit(main())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "region.py").write_text(TASK)
    (tmp_path / "region.yaml").write_text(CONFIG)
    return tmp_path


def test_on_the_cluster_of_ray_address(folder: Path, ray_address: str) -> None:
    words = ["train", "--cfg_file", "region.yaml", "--workers", "2"]
    said = commanded(words, folder, {**VARIABLES, "RAY_ADDRESS": ray_address}).ended(0)
    assert f"note: this trains on the Ray cluster at {ray_address}, which RAY_ADDRESS names" in said
    assert "96 samples" in said and f"note: {DIFFERS}rank 0, 1). SCALE.ENV: [REGION_LABEL]" in said
    journal = folder / "output" / "region" / "default" / "journal.jsonl"
    assert "a-secret" not in said + journal.read_text() and DIFFERS in journal.read_text()


def test_in_trials_of_a_sweep(folder: Path, ray_address: str) -> None:
    words = ["tune", "--cfg_file", "region.yaml", "--num_workers", "0", "--workers", "0"]
    said = commanded(words, folder, {**VARIABLES, "RAY_ADDRESS": ray_address}).ended(0)
    assert "RAY_ADDRESS names" in said and f"note: {DIFFERS}trials). SCALE.ENV: [REGION_LABEL]" in said
    [journal] = folder.glob("output/region/default/**/journal.jsonl")
    [run] = read_journal(open_storage(str(journal.parent)), kinds=("run",))
    assert run["num_samples"] == 96 and DIFFERS in journal.read_text()


def test_under_torchrun(folder: Path) -> None:
    words = ["-c", ELSEWHERE, "train", "--cfg_file", "region.yaml", "--workers", "2"]
    said = torchrun(words, folder).ended(0)
    assert "96 samples" in said and f"note: {DIFFERS}rank 1). SCALE.ENV: [REGION_LABEL]" in said


def test_a_dead_cluster_of_ray_address_is_named_at_once(folder: Path) -> None:
    words, began = ["train", "--cfg_file", "region.yaml"], time.monotonic()
    said = commanded(words, folder, {**VARIABLES, "RAY_ADDRESS": "127.0.0.1:9"}).ended(2)
    assert said.startswith("raytrain: RAY_ADDRESS=127.0.0.1:9: no Ray cluster answers there") and said.count("\n") == 1
    assert "say --address local" in said and time.monotonic() - began < 30
