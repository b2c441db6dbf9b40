"""The Ray cluster under a run: joined or started, checked before anything starts, and left clean."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raytrain.cluster.local_cluster import (
    FOR_TRIALS,
    OwnCluster,
    Warm,
    hush_raylets,
    is_tested,
    let_raylets_speak,
    on_loopback,
)
from raytrain.errors import PreflightError

AHEAD_S = 30.0  # processes that have not said by then that they stand are not waited for
ANSWER_S = 5.0  # a Ray head that has not answered by then is not there

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


def join(address: str) -> None:
    """Connect to the cluster at `address`, or a PreflightError that says why not."""
    import ray

    if is_tested():
        hush_raylets()
    try:
        with on_loopback() if is_on_loopback_only(address) else contextlib.nullcontext():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PreflightError(
            f"--address {address}: no Ray cluster answers there ({first_line}). Start one with "
            "`ray start --head`, or leave --address out to use this machine alone"
        ) from error


def is_on_loopback_only(address: str) -> bool:
    """Whether a head answers at 127.0.0.1 alone: Ray would try this machine's other address in its place."""
    import ray

    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdecimal():
        return False
    try:
        socket.create_connection((ray.util.get_node_ip_address(), int(port)), timeout=ANSWER_S).close()
    except OSError:
        return True
    return False


def check_address(address: str, patience_s: float = ANSWER_S) -> None:
    """PreflightError unless a Ray head answers at `address`: ray.init would try for minutes, and print of it."""
    if address.startswith("ray://"):
        raise PreflightError(
            f"--address {address}: training does not run through Ray Client; start it on the cluster with "
            f"`ray job submit --address http://HEAD:8265 -- raytrain train ...`, or give HEAD:6379"
        )
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    if address == "auto":
        return  # Ray looks for one on this machine, and says at once if there is none
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise PreflightError(f"--address {address}: this is no address of a Ray head; write HOST:PORT, or auto")
    fix = "Start one with `ray start --head`, or leave --address out to use this machine alone"
    if os.environ.get("RAY_USE_TLS", "0") in ("1", "true"):
        return
    try:
        answer = ask_head(host.strip("[]"), int(port), patience_s)
    except OSError as error:
        raise PreflightError(
            f"--address {address}: no Ray cluster answers there ({error.strerror or error}). {fix}"
        ) from error
    if answer is None:
        raise PreflightError(f"--address {address}: what answers there is no Ray head. {fix}")
    if answer == "refused" and os.environ.get("RAY_AUTH_MODE") is None:
        take_token(address)


def take_token(address: str) -> None:
    """The cluster wants a token: Ray sends this user's if it is told to, before it is imported."""
    places = [os.environ.get("RAY_AUTH_TOKEN_PATH"), str(Path.home() / ".ray" / "auth_token")]
    if not os.environ.get("RAY_AUTH_TOKEN") and not any(place and Path(place).is_file() for place in places):
        raise PreflightError(
            f"--address {address}: that cluster wants a token, and there is none here. Copy the head's "
            "~/.ray/auth_token to the same place on this machine, or set RAY_AUTH_TOKEN"
        )
    os.environ["RAY_AUTH_MODE"] = "token"


def ask_head(host: str, port: int, patience_s: float) -> str | None:
    """What a Ray head answers to one call without a token: "open" or "refused"; None from what is no Ray head.

    A call of gRPC by hand (RFC 9113, RFC 7541): Ray's own client prints a line a second while it is refused.
    """

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode()

    def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    call = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/ray.rpc.NodeInfoGcsService/GetClusterId",
        ":authority": "head",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    headers = b"".join(b"\0" + text(name) + text(value) for name, value in call.items())
    data, headers_kind, settings = 0, 1, 4
    end_stream, end_headers = 1, 4
    with socket.create_connection((host, port), timeout=patience_s) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(settings, 0, 0))
        connection.sendall(frame(headers_kind, end_headers, 1, headers) + frame(data, end_stream, 1, bytes(5)))
        stream = connection.makefile("rb")
        first = True
        while len(head := stream.read(9)) == 9:
            size, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
            if first and kind != settings:
                return None
            first = False
            stream.read(size)
            if kind == settings and not flags:
                connection.sendall(frame(settings, 1, 0))
            if kind == data and size:
                return "open"
            if kind == headers_kind and flags & end_stream:  # an error comes without data
                return "refused"
    return None


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


def attempt(launch: str) -> str:
    """Which start of a run's workers this worker belongs to: Ray makes a placement group for each.

    Except for the workers of a sweep's trial, who all have the trial's: `starts` counts those.
    """
    import ray

    group = ray.get_runtime_context().get_placement_group_id() or ""
    return named_attempt(group, Mailbox(launch).get("starts"))


def named_attempt(group: str, starts: int | None) -> str:
    return group if starts is None else f"{group}.{starts}"


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

        found = _internal_kv_get(key, namespace=self.namespace)
        return None if found is None else json.loads(found)

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


def wait_reason(per_worker: dict[str, float], num_workers: int) -> str:
    """What the workers are waiting for on a busy cluster, for the live line."""
    import ray

    free = ray.available_resources()
    parts = [
        f"{name} {need * num_workers:g} ({free.get(name, 0.0):g} free)" for name, need in per_worker.items() if need
    ]
    return f"the cluster has no room yet: {', '.join(parts)}"
