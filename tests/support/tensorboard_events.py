"""What tensorboard itself reads of a folder of event files."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest


def events_of(folder: Path, kind: str) -> Any:
    """An EventAccumulator that holds all events of this kind, "scalars" or "images"; skips without tensorboard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorboard's own imports
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        events = accumulator.EventAccumulator(str(folder), size_guidance={kind: 0})
        events.Reload()
    return events
