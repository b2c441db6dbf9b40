"""How others find the keeper of a run folder, start it, and ask it for what it holds."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import raytrain
from raytrain.errors import PreflightError
from raytrain.keeper.line import ANSWER_S, Line, is_own
from raytrain.progress import Progress

START_S = 60.0


SAVE_S = 900.0  # so long a keeper that ends may take to save what it holds


def is_possible() -> bool:
    """Whether this system has what a keeper needs: Linux does."""
    return hasattr(os, "memfd_create") and sys.platform == "linux"


def address_of(run_uri: str) -> str:
    """Where the keeper of a run folder listens on this host, by whichever links the folder is named."""
    place = run_uri if "://" in run_uri else os.path.realpath(run_uri)
    return f"\0raytrain-{os.getuid()}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:24]}"


def connected(run_uri: str) -> Line | None:
    """A line to this run folder's keeper on this host; None if there is none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(address_of(run_uri))
    except OSError:
        sock.close()
        return None
    if not is_own(sock):
        sock.close()
        return None
    return Line(sock)


def started(run_uri: str, launch: str) -> Line:
    """A line to the keeper of this run folder, which is started if there is none."""
    line = connected(run_uri)
    if line is None:
        # It leaves this process's family at once: Ray ends the children of its workers with them.
        package = str(Path(raytrain.__file__).parent.parent)
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "raytrain.keeper.keeper", run_uri, launch]
        with subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            try:
                _, told = process.communicate(timeout=START_S)
            except subprocess.TimeoutExpired:  # else leaving this block would wait for it without end
                process.kill()
                told = f"it took more than {START_S:g} s".encode()
        line = connected(run_uri)
        if line is None:
            raise OSError(f"the keeper of {run_uri} did not start: {told.decode(errors='replace').strip()[-2000:]}")
    return line


def asked(run_uri: str, op: str) -> dict[str, Any]:
    """What the keeper of this run folder on this host answers; empty if there is none, or it takes too long."""
    line = connected(run_uri) if is_possible() else None
    if line is None:
        return {}
    with contextlib.closing(line), contextlib.suppress(EOFError, OSError):
        line.say(op=op)
        if line.hears(ANSWER_S):
            return line.hear()
    return {}


def held(run_uri: str) -> Progress | None:
    """Where the newest state stands that is in memory on this host for this run folder; None if there is none."""
    found = asked(run_uri, "newest").get("newest")
    return Progress(*found) if found else None


def take_over(run_uri: str, patience_s: float) -> None:
    """Nobody keeps this run folder on this host any more: the newest state that was kept is in its checkpoints.

    Returns without that if workers still train there after patience_s. PreflightError if the keeper does not answer,
    or cannot save it.
    """
    line = connected(run_uri) if is_possible() else None
    if line is None:
        return
    try:
        line.say(op="take_over", patience_s=patience_s)
        told = line.hear_within(patience_s + SAVE_S)  # that workers train there, or the end
        if "unsaved" in told:
            raise PreflightError(
                f"{run_uri}: the state after step {told['step']} stands in the memory of process {line.peer} only, "
                f"which could not save it: {told['unsaved']}\nIt tries again every few seconds and at the next launch. "
                f"`kill -9 {line.peer}` gives up what is in no checkpoint"
            )
    except (EOFError, OSError):
        return
    finally:
        line.close()
