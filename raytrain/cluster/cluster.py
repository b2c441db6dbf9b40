"""The Ray cluster under a run: joined or started, connected to, and left clean."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from raytrain.cluster.address import OWN, Address, address_of, check_address, join, meant_by
from raytrain.cluster.local_cluster import PRELOAD_FOR_TRIALS, LocalCluster, Prestart, is_tested, restore_raylets
from raytrain.cluster.mailbox import count_prestarted
from raytrain.cluster.signal_handlers import keep_signal_handlers
from raytrain.cluster.suspend import suspended_together
from raytrain.errors import PreflightError
from raytrain.hash_seed import FIXED, VARIABLE

PRESTART_TIMEOUT_S = 30.0  # processes that do not stand by then are not waited for

# Set where the user has not: each is read by Ray in the driver and handed on to its workers.
RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # reports are taken and the end is noticed this fast (default 2 s)
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # print() in a worker stays print()
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning in workers
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # its controller is within the driver
}


class Cluster:
    """The Ray cluster for the time of a block: made by `starting`, there to be used after `connect`."""

    def __init__(self, address: Address | None, own: LocalCluster | None = None) -> None:
        self._address, self._own = address, own
        self._is_auto = address is not None and address.where == "auto"

    @property
    def is_ours(self) -> bool:
        """Whether it was started for this process, and no one else uses it."""
        return self._own is not None

    @property
    def note(self) -> str:
        """That it is one which nobody asked for by name; "" where that is not so."""
        if self._address is None:
            return ""
        where = f"the Ray cluster at {self._address.where}"
        if not self._address.is_given:
            return f"this trains on {where}, which RAY_ADDRESS names; --address {OWN} starts a cluster for it here"
        return f"this trains on {where}, which --address auto means" if self._is_auto else ""

    @property
    def dashboard_url(self) -> str:
        """Where the dashboard that was asked for is; "" if none was."""
        return "" if self._own is None else self._own.dashboard_url

    def wait_for_workers(self, timeout_s: float = PRESTART_TIMEOUT_S) -> None:
        """Returns once the prestarted processes can be given to workers; Ray would start others before."""
        count = 0 if self._own is None else self._own.prestart.count
        give_up = time.monotonic() + timeout_s
        while count > count_prestarted() and time.monotonic() < give_up:
            time.sleep(0.02)

    def make_spares(self) -> bool:
        """Have processes start as the prestarted ones did, for a restart; to be called until it says that they do."""
        return self._own is None or self._own.prestart.count == 0 or self._own.make_spares()

    def connect(self) -> None:
        """Returns once this process is connected; a PreflightError says why it cannot be."""
        if self._own is not None:
            self._own.join()
            keep_signal_handlers()
            return
        if self._address is not None:
            self._address = meant_by(self._address)
            check_address(self._address)
        import ray

        if not ray.is_initialized():
            assert self._address is not None  # else there is a cluster of our own
            own_handler = signal.getsignal(signal.SIGTERM)  # ray.init puts its own in place
            join(self._address)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, own_handler)
        elif self._address is not None:
            raise PreflightError(
                f"{self._address}: this process is already connected to Ray; leave the address out to use that"
            )


@contextlib.contextmanager
def starting(
    address: str | None,
    num_cpus: int | None = None,
    dashboard: bool = False,
    scale: Any = None,
    prestart: Prestart | None = None,
) -> Iterator[Cluster]:
    """A Ray cluster for the time of the block, which may do other things before it connects.

    The one that this process is already connected to; else the one at `address`, or that RAY_ADDRESS names; else, or
    where the address is "local", one of our own on this machine (of num_cpus CPUs, its real ones unless given), of
    which nothing is left.
    It begins to start at once; with `scale`, so do worker processes for it, or those that `prestart` says.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        yield Cluster(None if address is None else Address(address))
        return
    joined = address_of(address)
    if dashboard and joined is not None:
        raise PreflightError(
            f"--dashboard is Ray's, of a cluster that is started for the run, and {joined} names one to join; "
            f"leave --dashboard out, or {joined.way_out}"
        )
    # Ray turns its token on in the environment; another cluster may want none.
    settings = {**RAY_SETTINGS, VARIABLE: FIXED}  # one order of sets, also where the driver's own is random
    kept = {name: os.environ.get(name) for name in (*settings, "RAY_AUTH_MODE")}
    os.environ.update({name: value for name, value in settings.items() if kept[name] is None})
    own = None
    try:
        if joined is None:
            own = LocalCluster(num_cpus, dashboard, prestart or prestart_for(scale, num_cpus))
        with suspended_together() if own is not None else contextlib.nullcontext():
            yield Cluster(joined, own)
    finally:
        if own is not None:
            own.close()
        elif "ray" in sys.modules:
            sys.modules["ray"].shutdown()
            if is_tested():
                restore_raylets()
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)


def starting_for_trials(cfg: Any, address: str | None) -> contextlib.AbstractContextManager[Cluster]:
    """As `starting`, for a sweep of `cfg`: as many processes start as trials train at a time."""
    scale, cores = cfg.SCALE, len(os.sched_getaffinity(0))
    fitting = int(cores / (scale.CPUS_PER_WORKER * (scale.MIN_WORKERS or scale.NUM_WORKERS or 1)))
    count = max(1, min(cfg.TUNE.CONCURRENT or fitting, fitting))
    return starting(address, prestart=Prestart(count, scale.CPUS_PER_WORKER, PRELOAD_FOR_TRIALS))


def prestart_for(scale: Any, num_cpus: int | None) -> Prestart:
    """The worker processes that a cluster of our own starts before the run asks for them: none where not all fit.

    Ray starts no more at once than this process has cores, and forgets the others: they are not to be waited for.
    """
    if scale is None:
        return Prestart()
    num_workers, cpus = scale.NUM_WORKERS or scale.MIN_WORKERS or 1, float(scale.CPUS_PER_WORKER)
    fitting = int((num_cpus or os.cpu_count() or 1) / cpus + 1e-9)
    if scale.is_elastic and fitting >= scale.MIN_WORKERS:  # it begins with those that fit
        num_workers = min(scale.NUM_WORKERS or fitting, fitting)
    return Prestart(min(num_workers, len(os.sched_getaffinity(0))) if num_workers <= fitting else 0, cpus)
