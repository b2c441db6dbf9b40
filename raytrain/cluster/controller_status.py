"""What goes on in the thread of Ray Train's controller, for the driver's own thread to look at."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

PLACEMENT_POLL_S = 1  # how often one that waits for room sees whether it still shall; Ray counts in whole seconds here


class ControllerStatus:
    """Where the run stands, as that thread knows; and the driver's one wish to it.

    waits_for_resources: whether it is the cluster that keeps the workers from beginning, for the first time or again
    attempt:         which start of the workers this is, as mailbox.current_attempt tells them; "" before the first
    nodes:           ids of the nodes that the workers are on
    num_workers:     that train, or begin to
    num_kept:        those of them whose processes have trained before
    restarts:        whether they are to be started again, after they have failed
    restart_reasons: what ended the workers each time that they are started again, for the user
    give_up_reason:  why they were not started again, for the user; "" if there is nothing to be said
    abandoned:       set once the run is not wanted any more
    """

    def __init__(self) -> None:
        self.waits_for_resources, self.attempt, self.nodes = False, "", frozenset[str]()
        self.num_workers, self.num_kept, self.restarts = 0, 0, False
        self.restart_reasons: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.give_up_reason = ""
        self.abandoned = threading.Event()

    def wait_for_placement(self, placement_group: Any, timeout_s: float) -> bool:
        """Whether `placement_group` comes to be before the timeout, and before the run is abandoned."""
        give_up = time.monotonic() + timeout_s
        self.waits_for_resources = True
        try:
            while not self.abandoned.is_set() and time.monotonic() < give_up:
                if placement_group.wait(PLACEMENT_POLL_S):
                    return True
            return False
        finally:
            self.waits_for_resources = False

    def leaving_nodes(self) -> dict[str, int]:
        """Those of `nodes` that are taken away, and when: milliseconds since 1970, 0 where that is not said."""
        from ray._private.state import state as cluster_state

        return {node: at for node, at in cluster_state.get_draining_nodes().items() if node in self.nodes}
