"""The Ray cluster under a run: joined or started, checked before anything starts, and left clean."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raytrain.cluster.address import check_address, join
from raytrain.cluster.local_cluster import FOR_TRIALS, OwnCluster, Warm, is_tested, let_raylets_speak
from raytrain.cluster.mailbox import Mailbox
from raytrain.cluster.suspend import suspended_together
from raytrain.errors import PreflightError

AHEAD_S = 30.0  # processes that have not said by then that they stand are not waited for

# Set where the user has not: each is read by Ray in the driver and handed on to its workers.
QUIET = {
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

    def __init__(self, address: str | None, own: OwnCluster | None = None) -> None:
        self._address, self._own = address, own

    @property
    def is_ours(self) -> bool:
        """Whether it was started for this process, and no one else uses it."""
        return self._own is not None

    @property
    def dashboard_url(self) -> str:
        """Where the dashboard that was asked for is; "" if none was."""
        return "" if self._own is None else self._own.dashboard_url

    def wait_for_workers(self, patience_s: float = AHEAD_S) -> None:
        """Returns once the processes that started ahead can be given to workers; Ray would start others before."""
        count = 0 if self._own is None else self._own.warm.count
        give_up = time.monotonic() + patience_s
        ahead = Mailbox("ahead")
        while count > len(ahead.keys("process-")) and time.monotonic() < give_up:
            time.sleep(0.02)

    def make_spares(self) -> bool:
        """Have processes start as those that started ahead, for a restart; to be called until it says that they do."""
        return self._own is None or self._own.warm.count == 0 or self._own.make_spares()

    def connect(self) -> None:
        """Returns once this process is connected; a PreflightError says why it cannot be."""
        if self._own is not None:
            self._own.join()
            keep_signal_handlers()
            return
        if self._address is not None:
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
                f"--address {self._address}: this process is already connected to Ray; "
                "leave the address out to use that"
            )


def keep_signal_handlers() -> None:
    """What Python says of signals holds again beneath it, where Ray has put handlers of its own.

    own_cluster.signal_handlers_kept, which does so in a thread, does not know of one that came meanwhile.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.getsignal(number))


@contextlib.contextmanager
def starting(
    address: str | None,
    num_cpus: int | None = None,
    dashboard: bool = False,
    scale: Any = None,
    warm: Warm | None = None,
) -> Iterator[Cluster]:
    """A Ray cluster for the time of the block, which may do other things before it connects.

    The one that this process is already connected to; else the one at `address`; else one of our
    own on this machine (of num_cpus CPUs, its real ones unless given), of which nothing is left.
    It begins to start at once; with `scale`, so do worker processes for it, or those that `warm` says.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        yield Cluster(address)
        return
    # Ray turns its token on in the environment; another cluster may want none.
    kept = {name: os.environ.get(name) for name in (*QUIET, "RAY_AUTH_MODE")}
    os.environ.update({name: value for name, value in QUIET.items() if kept[name] is None})
    own = None
    try:
        if address is None:
            own = OwnCluster(num_cpus, dashboard, warm or workers_ahead(scale, num_cpus))
        with suspended_together() if own is not None else contextlib.nullcontext():
            yield Cluster(address, own)
    finally:
        if own is not None:
            own.close()
        elif "ray" in sys.modules:
            sys.modules["ray"].shutdown()
            if is_tested():
                let_raylets_speak()
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)


def starting_for_trials(cfg: Any, address: str | None) -> contextlib.AbstractContextManager[Cluster]:
    """As `starting`, for a sweep of `cfg`: as many processes start as trials train at a time."""
    scale, cores = cfg.SCALE, len(os.sched_getaffinity(0))
    fitting = int(cores / (scale.CPUS_PER_WORKER * (scale.NUM_WORKERS or 1)))
    count = max(1, min(cfg.TUNE.CONCURRENT or fitting, fitting))
    return starting(address, warm=Warm(count, scale.CPUS_PER_WORKER, FOR_TRIALS))


def workers_ahead(scale: Any, num_cpus: int | None) -> Warm:
    """The worker processes that a cluster of our own starts ahead of the run: none where not all fit.

    Ray starts no more at once than this process has cores, and forgets the others: they are not to be waited for.
    """
    if scale is None:
        return Warm()
    num_workers, cpus = scale.NUM_WORKERS or 1, float(scale.CPUS_PER_WORKER)
    fit = num_workers * cpus <= (num_cpus or os.cpu_count() or 1)
    return Warm(min(num_workers, len(os.sched_getaffinity(0))) if fit else 0, cpus)


@contextlib.contextmanager
def connected(address: str | None, num_cpus: int | None = None) -> Iterator[Cluster]:
    """As `starting`, and connected."""
    with starting(address, num_cpus) as cluster:
        cluster.connect()
        yield cluster


def resources_per_worker(scale: Any, use_gpu: bool) -> dict[str, float]:
    """What one worker reserves, in Ray's names."""
    wanted = {"CPU": float(scale.CPUS_PER_WORKER), **scale.RESOURCES}
    if use_gpu:
        wanted["GPU"] = float(scale.GPUS_PER_WORKER)
    return wanted


def resolve_workers(scale: Any) -> tuple[int, bool]:
    """How many workers, and whether they use GPUs: what SCALE leaves open is read off the cluster."""
    import ray

    num_gpus = ray.cluster_resources().get("GPU", 0.0)
    fitting = int(num_gpus // scale.GPUS_PER_WORKER)
    use_gpu = fitting >= (scale.NUM_WORKERS or 1) if scale.USE_GPU == "auto" else bool(scale.USE_GPU)
    return scale.NUM_WORKERS or (fitting if use_gpu and fitting else 1), use_gpu


def check_resources(num_workers: int, per_worker: dict[str, float]) -> None:
    """PreflightError if this cluster could never hold the workers; Ray itself would wait for ever (RAY.md F15)."""
    import ray

    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    fits = fitting_workers(per_worker)
    if fits >= num_workers:
        return
    total = ray.cluster_resources()
    lines = [
        f"  {name}: {need * num_workers:g} wanted ({num_workers} x {need:g}), the cluster has {total.get(name, 0.0):g}"
        for name, need in per_worker.items()
        if need > 0
    ]
    fix = "use fewer workers (--num_workers), or less each (--set SCALE.CPUS_PER_WORKER 0.5)"
    absent = [name for name, need in per_worker.items() if need > 0 and name not in total]
    if absent:
        fix = f"take {absent[0]} out of SCALE.RESOURCES, or start nodes that have it (ray start --resources)"
    if per_worker.get("GPU", 0) > total.get("GPU", 0.0):
        fix = "train on the CPU (--no_gpu), or join a cluster with GPUs (--address)"
    raise PreflightError(
        f"this cluster of {len(nodes)} node{'s' if len(nodes) != 1 else ''} can never hold {num_workers} workers, "
        f"only {fits}:\n" + "\n".join(lines) + f"\nWhat to do: {fix}"
    )


def fitting_workers(per_worker: dict[str, float]) -> int:
    """How many workers this cluster can hold, with nothing else on it."""
    import ray

    return sum(room(node["Resources"], per_worker) for node in ray.nodes() if node["Alive"])


def room(resources: dict[str, float], per_worker: dict[str, float]) -> int:
    """How many workers fit into these resources."""
    return min(int(resources.get(name, 0.0) / need + 1e-9) for name, need in per_worker.items() if need > 0)


def address_of(node_id: str) -> str:
    """Of a node, for people."""
    import ray

    return next((str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] == node_id), node_id)


def free_workers(per_worker: dict[str, float]) -> int:
    """How many workers the cluster has room for at this moment, at most."""
    import ray

    return room(ray.available_resources(), per_worker)


def check_reachable(run_uri: str) -> None:
    """PreflightError unless every node of the cluster sees the run folder that this process sees."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] != here]
    if "://" in run_uri or not others:
        return
    marker = Path(run_uri) / f".reachable-{os.getpid()}"
    marker.touch()
    try:
        probe = ray.remote(num_cpus=0, max_retries=0)(_sees)
        seen = [
            probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)).remote(
                str(marker)
            )
            for n in others
        ]
        blind = [n["NodeManagerAddress"] for n, ok in zip(others, ray.get(seen, timeout=60), strict=True) if not ok]
    finally:
        marker.unlink(missing_ok=True)
    if blind:
        raise PreflightError(
            f"the run folder {run_uri} is not visible on {len(blind)} of {len(others) + 1} nodes "
            f"({', '.join(blind[:5])}). Give --output a folder that all nodes share (NFS) or a URI such as s3://bucket/path"
        )


def _sees(marker: str) -> bool:
    return Path(marker).exists() and os.access(Path(marker).parent, os.W_OK)


def wait_reason(per_worker: dict[str, float], num_workers: int) -> str:
    """What the workers are waiting for on a busy cluster, for the live line."""
    import ray

    free = ray.available_resources()
    parts = [
        f"{name} {need * num_workers:g} ({free.get(name, 0.0):g} free)" for name, need in per_worker.items() if need
    ]
    return f"the cluster has no room yet: {', '.join(parts)}"
