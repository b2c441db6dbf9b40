"""YAML of a small config, loaded, or refused as a user reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytrain.config.load import load_config
from raytrain.config.sections import Config
from raytrain.errors import ConfigError

LEAST = """\
TASK: pkg.module:Class
OPTIMIZATION:
  BATCH_SIZE_PER_GPU: 4
  NUM_EPOCHS: 3
"""
WHOLE = (
    LEAST
    + """\
  LR: 1e-3
  MOMS: [0.95, 0.85]
CLASS_NAMES: [Car, Pedestrian]
DATA_CONFIG: {SHUFFLE: true, ROOT: data/x, AUG: null, SIZES: [[1, 2], [3, 4]]}
MODEL:
  WIDTH: 16
  DROPOUT: 0.5
  NAME: Net
  VFE: {NAME: PillarVFE, FILTERS: [64], RATES: [0.1, 0.2], USE_NORM: true}
  HEADS:
    - {NAME: A, CLASSES: [Car]}
    - {NAME: B, CLASSES: [Bus]}
"""
)


def write(folder: Path, text: str, name: str = "x.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def loaded(folder: Path, text: str, *overrides: str) -> Config:
    return load_config(write(folder, text), overrides)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    """What a user reads, with the folder of the files taken off."""
    with pytest.raises(ConfigError) as caught:
        loaded(folder, text, *overrides)
    assert caught.value.exit_status == 2
    return str(caught.value).replace(f"{folder}/", "")
