"""How a run failed, as plain values that travel from a worker to the person who reads them."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from raytrain.errors import EXIT_FAILED, RaytrainError

HERE = str(Path(__file__).parent)


def failure_of(error: BaseException, rank: int, at: dict[str, Any], logs: str) -> dict[str, Any]:
    """What the failure screen shows.

    at: what is known of the place: epoch, step (the one under way, from 1), samples (ids)
    logs: where this worker's full output is
    """
    return {
        "rank": rank,
        **at,
        "error": f"{type(error).__name__}: {error}",
        "expected": isinstance(error, RaytrainError),
        "message": str(error),
        "traceback": users_traceback(error),
        "exit_status": getattr(error, "exit_status", EXIT_FAILED),
        "logs": logs,
    }


def users_traceback(error: BaseException) -> str:
    """The traceback from the user's first frame on: our own frames around it explain nothing to them."""
    frames = list(traceback.walk_tb(error.__traceback__))
    user_first = next((i for i, (f, _) in enumerate(frames) if not f.f_code.co_filename.startswith(HERE)), 0)
    summary = traceback.TracebackException(type(error), error, error.__traceback__)
    for _ in range(user_first):
        if summary.stack:
            summary.stack.pop(0)
    return "".join(summary.format()).rstrip()
