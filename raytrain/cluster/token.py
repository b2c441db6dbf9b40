"""The token that a Ray cluster wants of whoever talks to it: this user's, or one that goes with the cluster."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raytrain.errors import PreflightError
from raytrain.storage.scratch import ScratchFolder


def is_at_hand() -> bool:
    """Whether this user has one where Ray looks for it; PreflightError where RAY_AUTH_TOKEN_PATH names no file."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    if named := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        if not Path(named).is_file():
            raise PreflightError(f"RAY_AUTH_TOKEN_PATH is {named}, and there is no such file. Unset it, or make it one")
        return True
    home = token_at_home()
    return home is not None and home.is_file()


def token_at_home() -> Path | None:
    """Where Ray keeps it, which asks for HOME alone; None without that."""
    home = os.environ.get("HOME")
    return Path(home) / ".ray" / "auth_token" if home else None


@contextlib.contextmanager
def token_at_hand() -> Iterator[None]:
    """In the block a cluster that starts has a token, without which whoever reaches its ports could run code.

    It is this user's, made if there is none yet. Where no home can hold it (HOME=/, one that is read-only), it is the
    cluster's own: in a folder for it alone, since Ray lets everybody write in the cluster's.
    """
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or is_at_hand() or made_at_home():
        yield
        return
    scratch = ScratchFolder()
    path = scratch.path / "auth_token"
    write_private(path)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    forget_token()
    try:
        yield
    finally:
        del os.environ["RAY_AUTH_TOKEN_PATH"]
        forget_token()
        scratch.remove()


def made_at_home() -> bool:
    """Whether there is one at home now: this one, or that of a process that has been faster."""
    path = token_at_home()
    if path is None:
        return False
    draft = path.with_name(f"auth_token-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(exist_ok=True)
        write_private(draft)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)  # Ray would write over another's, with which a cluster has just begun to start
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
    forget_token()
    return True


def write_private(path: Path) -> None:
    """A new token, for this user's eyes."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def forget_token() -> None:
    """What Ray has read once in this process it would not read again."""
    from ray import _raylet

    loader: Any = getattr(_raylet, "AuthenticationTokenLoader", None)  # another Ray may have it elsewhere
    if loader is not None:
        loader.instance().reset_cache()
