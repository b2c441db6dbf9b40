"""Worker processes of a sweep's own cluster import this as they start: what a trial needs, and word that they stand."""

import os

import raytrain.sweep.trial  # noqa: F401
from raytrain.cluster.mailbox import Mailbox

Mailbox("ahead").put(f"process-{os.getpid()}", True)
