"""What workers and driver leave for each other in Ray's key-value store."""

from __future__ import annotations

import json
import os
from typing import Any


def current_attempt(launch: str) -> str:
    """Which start of a run's workers this worker belongs to: Ray makes a placement group for each.

    Except for the workers of a sweep's trial, who have the trial's, and of an elastic run, who have one each: `starts`
    counts those.
    """
    import ray

    group = ray.get_runtime_context().get_placement_group_id() or ""
    return attempt_name(group, Mailbox(launch).get("starts"))


def attempt_name(group: str, starts: int | None) -> str:
    return group if starts is None else f"start-{starts}"


def report_prestarted() -> None:
    """A worker process without a run yet says that it stands."""
    Mailbox("prestart").put(f"process-{os.getpid()}", True)


def count_prestarted() -> int:
    return len(Mailbox("prestart").keys("process-"))


class Mailbox:
    """A few small values between the driver and the workers of one launch, kept in the cluster's own store.

    It costs no process and no port. Workers put what the live line shows, and how they failed; the
    driver puts the wish to stop.
    """

    def __init__(self, launch: str) -> None:
        self.namespace = f"raytrain-{launch}"

    def put(self, key: str, value: Any) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(key, json.dumps(value), overwrite=True, namespace=self.namespace)

    def get(self, key: str) -> Any:
        """The value of `key`; None if it was never put."""
        from ray.experimental.internal_kv import _internal_kv_get

        value = _internal_kv_get(key, namespace=self.namespace)
        return None if value is None else json.loads(value)

    def keys(self, prefix: str) -> list[str]:
        from ray.experimental.internal_kv import _internal_kv_list

        return sorted(k.decode() for k in _internal_kv_list(prefix, namespace=self.namespace))

    def remove(self, prefix: str) -> None:
        """Remove what was put under keys that begin so."""
        from ray.experimental.internal_kv import _internal_kv_del

        _internal_kv_del(prefix, del_by_prefix=True, namespace=self.namespace)

    def clear(self) -> None:
        """Remove all that this launch has put."""
        self.remove("")
