"""How a run failed, as plain values that travel from a worker to the person who reads them."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path
from typing import Any

from raytrain.errors import EXIT_FAILED, DataError, DivergedError, LostLoaderError, LostWorkerError, RaytrainError

HERE = Path(__file__).parent


def failure_of(error: BaseException, rank: int, at: dict[str, Any], logs: str) -> dict[str, Any]:
    """What the failure screen shows.

    at: what is known of the place: `what` failed, epoch, step (the one under way, from 1), sample_ids
    logs: where this worker's full output is
    """
    return {
        "rank": rank,
        **at,
        "error": f"{type(error).__name__}: {error}",
        "expected": explains_itself(error),
        "diverged": isinstance(error, DivergedError),
        "lost_another": lost_another(error),
        "lost_loader": isinstance(error, LostLoaderError),
        "message": str(error),
        "traceback": str(error) if isinstance(error, DataError) else users_traceback(error),
        "exit_status": getattr(error, "exit_status", EXIT_FAILED),
        "logs": logs,
    }


def explains_itself(error: BaseException) -> bool:
    """True if its message is all that a user needs. A DataError needs to be told of the step too.

    (It carries the traceback of the process that loaded.)
    """
    return isinstance(error, RaytrainError) and not isinstance(error, DataError)


def lost_another(error: BaseException) -> bool:
    """True if it tells that another worker process is gone: what ended that one is not known here.

    (gloo says so in words, NCCL by torch's errors of a lost connection.)
    """
    by_gloo = isinstance(error, RuntimeError) and "gloo" in str(error) and "by peer" in str(error)
    return (
        isinstance(error, LostWorkerError)
        or by_gloo
        or type(error).__name__ in ("DistBackendError", "DistNetworkError")
    )


def keep_traceback(error: BaseException, run_uri: str) -> str:
    """The file below the run folder that the whole traceback of `error` was added to; "" if that cannot be."""
    path = Path(run_uri) / "logs" / "rank_0.log"
    try:
        if "://" in run_uri:
            return ""
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(traceback.format_exception(type(error), error, error.__traceback__))
    except OSError:  # a full disk may be the very error
        return ""
    return str(path)


def users_traceback(error: BaseException) -> str:
    """The traceback without the frames of ours around the user's: those explain nothing to them.

    Whole where no frame is the user's: then it is for those who mend raytrain.
    """
    summary = traceback.TracebackException(type(error), error, error.__traceback__)
    files = [frame.filename for frame in summary.stack]
    users = [index for index, file in enumerate(files) if is_users(file)]
    if isinstance(error, SyntaxError) and not users:
        summary.stack.clear()  # the error names its file and line itself
    if users:
        last = max(index for index, file in enumerate(files) if not is_ours(file))
        summary.stack[:] = summary.stack[users[0] : last + 1]
    return "".join(summary.format()).rstrip()


def is_users(file: str) -> bool:
    """Whether code in this file is the user's."""
    return not is_ours(file) and not _is_library(file)


def is_ours(file: str) -> bool:
    path = Path(file)
    return path.is_relative_to(HERE) and not path.is_relative_to(HERE / "tasks")  # what lies there is the user's


def _is_library(file: str) -> bool:
    """Python's and torch's own code: it calls the user's, as decorators and dispatchers."""
    parts = Path(file).parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1] == "torch"
    return file.startswith((sysconfig.get_path("stdlib"), "<"))
