"""Errors that speak to people: each says what was found, where, and what to do.

`exit_status` is what the command line returns when the error ends a run.
"""

import contextlib
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal with its checkpoint saved; run it again

HERE = Path(__file__).parent
SCREEN_LINES = 40
LINE_LENGTH = 240  # a message that prints a whole tensor must not fill the screen by itself
NAMES_SHOWN = 5
SAMPLES_SHOWN = 12


def masked(text: str) -> str:
    """`text` as it is shown: of each URI in it with a secret, as s3://key:secret@bucket, the secret is ***."""
    return re.sub(r"(://[^/:@?\s]*):(?!\d+/)[^@?\s]+@", r"\1:***@", text)


def listed(names: Iterable[Any], shown: int = NAMES_SHOWN, comma: str = ", ") -> str:
    """`a, b, c and 9 more`: the first `shown` of them, and how many are left."""
    each = list(map(str, names))
    more = f"{comma.rstrip(', ')} and {len(each) - shown} more" if len(each) > shown else ""
    return comma.join(each[:shown]) + more


class RaytrainError(Exception):
    """Base of every error that raytrain raises on purpose; a secret in a URI is not told.

    was_shown: the message has been shown already
    """

    exit_status = EXIT_FAILED
    was_shown = False

    def __init__(self, message: str = "") -> None:
        super().__init__(masked(message))


class ConfigError(RaytrainError):
    """The configuration or the command line asks for something impossible."""

    exit_status = EXIT_USAGE


class TaskError(RaytrainError):
    """The task cannot be imported, or breaks the Task contract."""

    exit_status = EXIT_USAGE


class PreflightError(RaytrainError):
    """The run could never start here: resources, cluster address, or output path."""

    exit_status = EXIT_USAGE


class ResumeError(RaytrainError):
    """Resuming would corrupt the run, so it is refused."""

    exit_status = EXIT_USAGE


class CheckpointError(RaytrainError):
    """A checkpoint is damaged, unreadable or not what it claims to be."""


class StorageError(RaytrainError):
    """The run folder cannot be read or written."""


class DataError(RaytrainError):
    """A sample could not be produced or a batch could not be made of samples."""


class CollateError(DataError):
    """The samples are there, but no batch could be made of them."""


class LostLoaderError(DataError):
    """The process that loads samples has died."""


class TrainingError(RaytrainError):
    """Training failed on a worker; the message is the one screen a user sees."""


class DivergedError(TrainingError):
    """Losses, gradients or weights did not stay finite: it would end so wherever it is trained."""


class LostWorkerError(TrainingError):
    """Another worker process has died or got stuck, and this one waited for it."""


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


def failure_screen(failure: Mapping[str, Any]) -> str:
    """One screen on a failed worker: who, when, the user's own traceback, where the logs are.

    failure: any of what (failed: "Training" if not said), rank, step, epoch (from 0), sample_ids, error (one
    line), traceback (cleaned text), logs (path); what is not known is left out or None.
    """
    head = f"{failure.get('what') or 'Training'} failed" + "".join(
        [
            f" on rank {failure['rank']}" if failure.get("rank") is not None else "",
            f" at step {failure['step']}" if failure.get("step") is not None else "",
            f" (epoch {failure['epoch'] + 1})" if failure.get("epoch") is not None else "",
        ]
    )
    lines = [head]
    if failure.get("sample_ids"):
        lines.append(f"samples: {listed(failure['sample_ids'], SAMPLES_SHOWN)}")
    trace = str(failure.get("traceback") or failure.get("error") or "no traceback arrived: the process died").strip()
    logs = ["", f"Full logs: {failure['logs']}"] if failure.get("logs") else []
    room = SCREEN_LINES - len(lines) - len(logs) - 1
    return "\n".join([*lines, "", *(f"  {line}".rstrip() for line in _trimmed(trace.splitlines(), room)), *logs])


def _trimmed(lines: list[str], room: int) -> list[str]:
    """At most `room` lines: the start and, more of it, the end, where the reason stands."""
    lines = [line if len(line) <= LINE_LENGTH else line[: LINE_LENGTH - 3] + "..." for line in lines]
    if len(lines) <= room:
        return lines
    start = room // 3
    end = room - start - 1
    return [*lines[:start], f"... {len(lines) - start - end} lines left out ...", *lines[-end:]]


@contextlib.contextmanager
def explained(what: str, run_dir: str) -> Iterator[None]:
    """An exception of the task is told as one of training is: `what` failed, in which lines of the user's."""
    try:
        yield
    except Exception as error:
        if explains_itself(error):
            raise
        raise as_seen(failure_of(error, 0, {"what": what}, keep_traceback(error, run_dir))) from error


def as_seen(failure: dict[str, Any]) -> RaytrainError:
    """The error that a user sees: the message alone where it explains itself, else the failure screen."""
    text = failure["message"] if failure["expected"] else failure_screen(failure)
    kind = DivergedError if failure.get("diverged") else TrainingError
    error = kind("\n\n".join(filter(None, [text, failure.get("given_up")])))
    error.exit_status = failure["exit_status"]
    return error
