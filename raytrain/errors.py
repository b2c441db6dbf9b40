"""Errors that speak to people: each says what was found, where, and what to do.

`exit_status` is what the command line returns when the error ends a run.
"""

import re

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal with its checkpoint saved; run it again


def masked(text: str) -> str:
    """`text` as it is shown: of each URI in it with a secret, as s3://key:secret@bucket, the secret is ***."""
    return re.sub(r"(://[^/:@?\s]*):(?!\d+/)[^@?\s]+@", r"\1:***@", text)


class RaytrainError(Exception):
    """Base of every error that raytrain raises on purpose; a secret in a URI is not told.

    told: the message has been shown already
    """

    exit_status = EXIT_FAILED
    told = False

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


class LostLoaderError(DataError):
    """The process that loads samples has died."""


class TrainingError(RaytrainError):
    """Training failed on a worker; the message is the one screen a user sees."""


class DivergedError(TrainingError):
    """Losses, gradients or weights did not stay finite: it would end so wherever it is trained."""


class LostWorkerError(TrainingError):
    """Another worker process has died or got stuck, and this one waited for it."""
