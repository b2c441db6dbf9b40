"""A config of OpenPCDet's own keeps the defaults of its tools/train.py, and its runs their folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs import write
from raytrain.config.load import dump_config, load_config
from raytrain.config.sections import Config

THEIRS = """\
CLASS_NAMES: [Car]
DATA_CONFIG: {_BASE_CONFIG_: cfgs/dataset_configs/data.yaml}
MODEL: {NAME: SECONDNet}
OPTIMIZATION: {BATCH_SIZE_PER_GPU: 4, NUM_EPOCHS: 80}
"""
TASK = ("TASK", "pkg.module:Class")


def config_in(folder: Path, text: str = THEIRS) -> Path:
    write(folder, "DATASET: KittiDataset\n", "tools/cfgs/dataset_configs/data.yaml")
    return write(folder, text, "tools/cfgs/kitti_models/second.yaml")


def defaults(cfg: Config) -> tuple[Any, ...]:
    return cfg.LOADER.WORKERS, cfg.CHECKPOINT.KEEP_LAST, cfg.EVAL.EVERY


@pytest.mark.parametrize("text", [THEIRS, THEIRS + "TASK: pkg.module:Class\n", THEIRS + "HOOK:\n"])
def test_a_config_of_theirs_keeps_their_defaults(tmp_path: Path, text: str) -> None:
    assert defaults(load_config(config_in(tmp_path, text), TASK)) == (4, 30, None)


def test_a_config_of_theirs_is_trained_by_their_code_unless_task_says_otherwise(tmp_path: Path) -> None:
    assert load_config(config_in(tmp_path)).TASK == "raytrain.tasks.openpcdet:OpenPCDetTask"
    assert TASK[1] == load_config(config_in(tmp_path), TASK).TASK
    assert load_config(config_in(tmp_path, THEIRS + "TASK: a:B\n")).TASK == "a:B"


@pytest.mark.parametrize(
    "text",
    [
        THEIRS + "SEED: 1\n",
        THEIRS + "LOADER: {PREFETCH: 3}\n",
        THEIRS.replace("NAME: SECONDNet", "WIDTH: 8"),
        THEIRS.replace("_BASE_CONFIG_: cfgs/dataset_configs/data.yaml", "SOURCE: kitti"),
    ],
)
def test_any_other_config_has_ours(tmp_path: Path, text: str) -> None:
    cfg = load_config(config_in(tmp_path, text), TASK)
    assert (*defaults(cfg), cfg.OUTPUT) == (2, 5, 1, "output")


def test_what_a_command_says_wins(tmp_path: Path) -> None:
    flags = [("--workers", "LOADER.WORKERS", "7"), ("--output", "OUTPUT", "elsewhere")]
    (tmp_path / "pcdet").mkdir()
    (tmp_path / "pcdet" / "__init__.py").touch()
    cfg = load_config(config_in(tmp_path), [*TASK, "EVAL.EVERY", "5"], flags)
    assert (*defaults(cfg), cfg.OUTPUT) == (7, 30, 5, "elsewhere")


def test_runs_of_a_checkout_lie_where_its_own_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tools/train.py writes to output/ of the checkout, from wherever it is started."""
    config = config_in(tmp_path)
    assert load_config(config, TASK).OUTPUT == "output"
    (tmp_path / "pcdet").mkdir()
    (tmp_path / "pcdet" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path / "tools")
    for path in (config, Path("cfgs/kitti_models/second.yaml")):
        cfg = load_config(path, TASK)
        assert (str(tmp_path / "output"), "kitti_models", "second") == (cfg.OUTPUT, cfg.EXP_GROUP_PATH, cfg.TAG)


def test_the_resolved_config_is_the_same_again(tmp_path: Path) -> None:
    cfg = load_config(config_in(tmp_path), TASK)
    assert load_config(write(tmp_path, dump_config(cfg), "config.yaml")) == cfg
