"""Worker processes of a sweep's own cluster import this as they start: what a trial needs, and word that they stand."""

import raytrain.sweep.trial  # noqa: F401
from raytrain.cluster.mailbox import report_prestarted

report_prestarted()
