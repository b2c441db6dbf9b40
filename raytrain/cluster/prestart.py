"""Worker processes of our own clusters import this as they start: what a run needs, and word that it is there."""

import ray.train.torch
import ray.train.v2._internal.execution.worker_group.worker  # noqa: F401

import raytrain.cluster.ray_worker  # noqa: F401
from raytrain.cluster.mailbox import report_prestarted

report_prestarted()
