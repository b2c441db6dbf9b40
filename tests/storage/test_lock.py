"""The lock on a run folder, beside processes that start while it is taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import subprocess, sys, threading
from raytrain.storage.lock import locked
from raytrain.storage.storage import open_storage

storage, over = open_storage(sys.argv[1]), threading.Event()

def take_it_again_and_again():
    while not over.is_set():
        with locked(storage):
            pass

threading.Thread(target=take_it_again_and_again, daemon=True).start()
for _ in range(100):
    subprocess.run(["true"], preexec_fn=lambda: None)  # as Ray starts its daemons: what is to be done in forks is done
over.set()
print("done")
"""


def test_what_another_thread_starts_as_the_lock_is_written_is_not_held_up(tmp_path: Path) -> None:
    """A launch stood still for ever, now and then: its cluster starts while it takes the lock."""
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
