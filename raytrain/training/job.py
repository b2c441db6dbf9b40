"""What a worker is told to do, and where it stands: the driver's folder, imports and a log of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, Protocol

from raytrain.config.sections import Config
from raytrain.storage.retry import as_storage_error
from raytrain.training.environment import Environment


@dataclasses.dataclass(frozen=True)
class Job:
    """What a launch asks of every worker.

    start: "auto" (newest verified checkpoint of the run folder, else step 0), "fresh", or the path
           of a checkpoint. The latter two hold until this launch has saved: when Ray starts the
           workers again, they go on from there.
    notes: what a user should know of where it begins, a line each
    driver: host, process and its start, of what keeps the run going: once it is dead nobody starts workers again
    cwd, search_path: of the driver (sys.path); workers take them over, so that a task file and
           relative paths mean the same there, on a cluster that was started elsewhere too
    environment: the driver's, as far as workers are to have it, or to be compared with it
    """

    cfg: Config
    run_uri: str
    launch: str
    use_gpu: bool
    virtual_workers: int
    start: str = "auto"
    allow_config_change: bool = False
    pretrained_model: str | None = None
    allow_partial: bool = False
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    cwd: str = ""
    search_path: tuple[str, ...] = ()
    driver: tuple[Any, ...] = ()
    environment: Environment = dataclasses.field(default_factory=Environment)


class Standpoint(Protocol):
    """Where a driver stands: its folder, where it imports from, and its environment."""

    @property
    def cwd(self) -> str: ...
    @property
    def search_path(self) -> tuple[str, ...]: ...
    @property
    def environment(self) -> Environment: ...


def stand_where_the_driver_stands(job: Standpoint) -> None:
    """Relative paths, imports and SCALE.ENV mean what they mean in the driver, where this node has its folder."""
    os.environ.update(job.environment.values)
    with contextlib.suppress(OSError):
        os.chdir(job.cwd)
    sys.path[:] = [*job.search_path, *(path for path in sys.path if path not in job.search_path)]


def redirect_output(run_uri: str, rank: int) -> str:
    """All that this process prints goes to a file of its own, whose path is returned; to Ray's behind a URI."""
    if "://" in run_uri:
        return "the Ray session's logs"
    path = Path(run_uri) / "logs" / f"rank_{rank}.log"
    sys.stdout.flush()
    sys.stderr.flush()
    with as_storage_error("write this log", str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    return str(path)
