"""What tasks_with_globals imports: tables and settings that somebody fills, as people's own modules have them."""

from __future__ import annotations

from typing import Any

SCALES: Any = None
OFFSET = 1.0
_READY: dict[str, float] = {}


def scale_of(kind: str) -> float:
    return 1.0 if SCALES is None else float(SCALES[kind])


def offset() -> float:
    return OFFSET


def doubled(x: float) -> float:
    return 2 * x


def ready(kind: str) -> float:
    """Made when it is first asked for."""
    if not _READY:
        _READY.update({"a": 1.0, "b": 2.0})
    return _READY[kind]
