"""Train PyTorch models on Ray from one YAML file, exactly, fast, and without ever losing work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Task": "raytrain.task",
    "ModelReturn": "raytrain.task",
    "Config": "raytrain.config.load",
    "load_config": "raytrain.config.load",
    "train": "raytrain.launch",
    "evaluate": "raytrain.training.evaluate",
    "Result": "raytrain.launch",
}
__all__ = ["Config", "ModelReturn", "Result", "Task", "evaluate", "load_config", "train"]

if TYPE_CHECKING:
    from raytrain.config.load import load_config
    from raytrain.config.sections import Config
    from raytrain.launch import Result, train
    from raytrain.task import ModelReturn, Task
    from raytrain.training.evaluate import evaluate


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: `import raytrain` loads neither torch nor ray."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'raytrain' has no attribute {name!r}")
