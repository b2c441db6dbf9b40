"""A Ray cluster of a run's own on this machine: only what a run needs, and it starts while the caller goes on."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from raytrain.cluster.signal_handlers import signal_handlers_kept
from raytrain.cluster.token import token_at_hand
from raytrain.errors import PreflightError, RaytrainError
from raytrain.storage.processes import children_of, command_of
from raytrain.storage.scratch import SHORT, SOCKET_PATH_BYTES, ScratchFolder, own_mark

TEMP_PREFIX = "raytrain-ray-"
SOCKET_BYTES = len("/session_2026-11-30_12-00-00_000000_1234567/sockets/plasma_store")  # the longest below its folder

# The versions whose private parts do what tests/cluster/test_ray_contract.py says; others get Ray's public ones.
TESTED = ("2.60.0",)

# Imported by worker processes as they start, while the driver does what comes before a run, or before a sweep.
PRELOAD_FOR_RUNS, PRELOAD_FOR_TRIALS = "raytrain.cluster.prestart", "raytrain.sweep.prestart"

IDLE = "ray::IDLE"  # what Ray calls a worker process without work

# Processes that wait for work are kept: they are few, and all are wanted.
SYSTEM_CONFIG: dict[str, Any] = {
    "num_workers_soft_limit": 10_000,
    "idle_worker_killing_time_threshold_ms": 10**9,
}


class Placeholder:
    """An actor that is asked for, and never made."""


@dataclasses.dataclass(frozen=True)
class Prestart:
    """`count` worker processes that start with a cluster, each to reserve `cpus` CPUs later; they import `preload`."""

    count: int = 0
    cpus: float = 1.0
    preload: str = PRELOAD_FOR_RUNS


def is_tested() -> bool:
    """Whether the installed Ray is one whose private parts are known."""
    return importlib.metadata.version("ray") in TESTED


class LocalCluster:
    """A cluster that begins to start when it is made, and of which nothing is left after `close`.

    num_cpus:  it has, the machine's real ones unless given
    dashboard: whether Ray's dashboard is served, with the processes that feed it
    prestart:  the worker processes that start with it
    """

    def __init__(self, num_cpus: int | None, dashboard: bool, prestart: Prestart) -> None:
        # Here and not in the thread: while two threads are in the imports of Ray, which go in circles, Python gives up.
        import ray  # noqa: F401

        # aiohttp_cors is of what ray[default] brings; without it Ray would print of it, and raise anything.
        if dashboard and importlib.util.find_spec("aiohttp_cors") is None:
            raise PreflightError(
                "--dashboard: what it needs is not installed; `pip install 'ray[default]'`, or leave it out"
            )
        self._num_cpus, self._dashboard = num_cpus, dashboard
        self.dashboard_url = ""
        self._is_minimal = is_tested() and not dashboard
        self.prestart = prestart if self._is_minimal else Prestart()
        self._raylet, self._spares_begun = 0, 0
        self._spares: list[Any] = []
        self._failure: BaseException | None = None
        self._ready, self._closing = threading.Event(), threading.Event()
        # The kernel ends Ray's processes with the thread that started them, so one thread has to last as long as they.
        self._thread = threading.Thread(target=self._run, name="raytrain-cluster", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Returns once this process is connected to it; raises what kept it from starting."""
        self._ready.wait()
        if isinstance(self._failure, Exception) and not isinstance(self._failure, RaytrainError):
            raise PreflightError(
                f"the Ray cluster for this run did not start ({first_line(self._failure)}). "
                "`--num_workers 0` trains in this process, without Ray; `--address` joins a cluster that stands"
            ) from self._failure
        if self._failure is not None:
            raise self._failure

    def make_spares(self) -> bool:
        """Have as many processes start as at first, for a restart to find; to be called until it says that they do.

        Ray starts a process for each actor that is asked for, and keeps it if by then no one wants the actor any
        more. (One that has had work, were it a task of nothing, is never given to an actor.)
        """
        import ray

        processes = [command_of(pid) for pid in children_of(self._raylet)]
        if not self._spares:
            if processes.count(IDLE) > 0:  # left by a restart that came before they were ready
                return True
            self._spares_begun = len(processes) + self.prestart.count
            placeholder: Any = ray.remote(num_cpus=0)(Placeholder)
            self._spares = [placeholder.remote() for _ in range(self.prestart.count)]
        elif len(processes) >= self._spares_begun:
            while self._spares:
                ray.kill(self._spares.pop())
        return not self._spares

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        if is_tested():
            # What Ray starts from this thread has it so too. A SIGTERM to all processes of a run (systemd, Slurm,
            # `timeout`) is the driver's to answer: if the daemons did, no worker could save its state.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        node = None
        with contextlib.ExitStack() as stack:
            stack.callback(self._ready.set)
            try:
                folder = cluster_folder()
                stack.callback(folder.remove)
                stack.enter_context(token_at_hand())
                with on_loopback(), signal_handlers_kept():
                    node = self._start(str(folder.path))
                self._ready.set()
                self._closing.wait()
            except BaseException as failure:
                self._failure = failure
                self._ready.set()
            finally:
                shut_down(node)

    def _start(self, temp_dir: str) -> Any:
        import ray

        logging_options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not self._is_minimal:
            options: dict[str, Any] = {
                "num_cpus": self._num_cpus,
                "include_dashboard": self._dashboard,
                "_temp_dir": temp_dir,
            }
            self.dashboard_url = ray.init("local", **options, **logging_options).dashboard_url or ""
            if is_tested():
                node = connected_node()
                node.kill_all_processes = functools.partial(kill_all_processes, node)
            return None
        node = start_node(temp_dir, self._num_cpus, self.prestart)
        self._raylet = node.all_processes["raylet"][0].process.pid
        silence_raylets()
        try:
            ray.init(node.gcs_address, **logging_options)
        except BaseException:
            shut_down(node)
            raise
        return node


def cluster_folder() -> ScratchFolder:
    """For all files of a cluster: in /tmp, which is short enough for sockets, or else in TMPDIR if that is."""
    try:
        return ScratchFolder(SHORT, TEMP_PREFIX)
    except OSError as error:
        most_bytes = SOCKET_PATH_BYTES - SOCKET_BYTES - len(f"/{own_mark(TEMP_PREFIX)}-12345678")
        temp_dir = os.environ.get("TMPDIR", SHORT)
        if temp_dir != SHORT and len(os.fsencode(temp_dir)) <= most_bytes:
            with contextlib.suppress(OSError):
                return ScratchFolder(temp_dir, TEMP_PREFIX)
        raise PreflightError(
            f"{SHORT} cannot be written to ({error.strerror}), where a Ray cluster of the run's own has its sockets. "
            f"Set TMPDIR to a folder that can, whose path has {most_bytes} characters at most; or train in this "
            "process, without Ray (--num_workers 0)"
        ) from error


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """A node that starts in the block, and all processes of it, listen on 127.0.0.1 alone, as Ray's do on a Mac.

    Else they listen on every address of the machine, though nobody elsewhere has business with them.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def start_node(temp_dir: str, num_cpus: int | None, prestart: Prestart) -> Any:
    """Ray's head node without its dashboard, autoscaler and log monitor, and with `prestart` processes for workers."""
    from ray._private.authentication import authentication_token_setup as token
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    logging.getLogger("ray").setLevel(logging.ERROR)  # the two below tell of what is as it should be
    token.enable_token_auth_by_default()  # as ray.init does: else whoever reaches the node's ports could run code
    token.ensure_token_if_auth_enabled(create_token_if_missing=True)

    class MinimalNode(Node):
        kill_all_processes = kill_all_processes  # type: ignore[assignment]

        def start_api_server(self, **options: Any) -> None:
            self._webui_url = ""

        def get_resource_and_label_spec(self) -> Any:
            """Ray starts as many processes at once as `num_cpus` says here; what the node has stays what it is."""
            spec = copy.copy(super().get_resource_and_label_spec())
            resources = spec.to_resource_dict()
            spec.num_cpus, spec.to_resource_dict = prestart.count, lambda: resources
            return spec

    parameters = RayParams(
        num_cpus=num_cpus,
        include_dashboard=False,
        include_log_monitor=False,  # type: ignore[arg-type]
        no_monitor=True,
        temp_dir=temp_dir,
        _system_config={**SYSTEM_CONFIG, "preload_python_modules": [prestart.preload]},  # type: ignore[dict-item]
        # Ray sets it when it gives a process to a worker, by the CPUs that this reserves: too late for what is loaded.
        env_vars={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, int(prestart.cpus))))},
    )
    return MinimalNode(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True, ray_init_cluster=True)


def kill_all_processes(node: Any, **options: Any) -> None:
    """In place of the method of Ray's node, which asks by SIGTERM, to which these are deaf, and waits for each.

    Those that the raylet has started, workers and agents, would ask for it for a while before they end.
    """
    daemons = [info.process for infos in node.all_processes.values() for info in infos]
    started = [pid for daemon in daemons for pid in children_of(daemon.pid)]
    for daemon in daemons:
        daemon.kill()
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == pid:  # a worker, with the processes that it has started
                os.killpg(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)
    for daemon in daemons:
        daemon.wait()
    node.all_processes.clear()


def connected_node() -> Any:
    """Ray's node that this process is connected to."""
    from ray._private import worker

    return worker._global_node


def silence_raylets() -> None:
    """Until `restore_raylets` Ray prints no screenful of each worker that dies: a restart says it in a line."""
    from ray._private import worker

    original = worker.print_to_stdstream

    @functools.wraps(original)
    def print_unless_of_raylet(data: Any, ignore_prefix: bool) -> None:
        if data["pid"] != "raylet":
            original(data, ignore_prefix)

    worker.print_to_stdstream = print_unless_of_raylet


def restore_raylets() -> None:
    from ray._private import worker

    worker.print_to_stdstream = getattr(worker.print_to_stdstream, "__wrapped__", worker.print_to_stdstream)


def shut_down(node: Any) -> None:
    """Disconnect this process, and end what `start_node` has started."""
    import ray

    ray.shutdown()
    if is_tested():
        restore_raylets()
    if node is not None:
        node.kill_all_processes(check_alive=False, allow_graceful=True)
