"""The hash seed of a process, by which sets of texts have their order: one for all processes of all runs.

Python draws one for each process unless PYTHONHASHSEED says which. So class numbers that are made of a set of names
would be others in each worker, and others again in a run that goes on or is evaluated.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import NoReturn

VARIABLE = "PYTHONHASHSEED"
FIXED = "0"  # not SEED: weights go from one SEED to another (--pretrained_model, sweeps), and classes with them
RANDOM = "random"
PROBE = "raytrain"


def hash_seed() -> str:
    """What PYTHONHASHSEED was when this process started, or "random"; a script may have set it since, in vain."""
    if not sys.flags.hash_randomization:
        return FIXED
    given = os.environ.get(VARIABLE, "")
    return given if given.isdecimal() and hash(PROBE) == hash_under(given) else RANDOM


def hash_under(seed: str) -> int:
    """How PROBE hashes in a process of that seed: 15 ms, where a user has set one of his own."""
    command = [sys.executable, "-S", "-c", f"print(hash({PROBE!r}))"]
    environment = {**os.environ, VARIABLE: seed}
    answer = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return int(answer.stdout) if answer.returncode == 0 else 0


def hash_seed_to_hand_on() -> str:
    """For the processes that this one has started elsewhere: what its user has set, or the fixed one."""
    return os.environ.get(VARIABLE) or FIXED


def may_begin_again() -> bool:
    """Whether this process, which runs a command of ours, has a seed drawn at random that nobody has asked for.

    Not where it was started to do something else, stands with threads already, or is debugged.
    """
    words = sys.argv[1:]
    is_free = sys.gettrace() is None and threading.active_count() == 1 and sys.orig_argv[-len(words) :] == words
    return is_free and bool(sys.flags.hash_randomization) and not os.environ.get(VARIABLE)


def begin_again() -> NoReturn:
    """This process does what it was asked to from the start, under a fixed hash seed: 25 ms where nothing was imported.

    It stays the same process: to its parent, its terminal, its signals.
    """
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, VARIABLE: FIXED})
