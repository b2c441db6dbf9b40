"""What a cluster has to hold the workers of a run: counted, checked before anything starts, and waited for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from raytrain.errors import PreflightError


def resources_per_worker(scale: Any, use_gpu: bool) -> dict[str, float]:
    """What one worker reserves, in Ray's names."""
    wanted = {"CPU": float(scale.CPUS_PER_WORKER), **scale.RESOURCES}
    if use_gpu:
        wanted["GPU"] = float(scale.GPUS_PER_WORKER)
    return wanted


def resolve_workers(scale: Any, virtual_workers: int | None = None) -> tuple[int, bool]:
    """How many workers at most, and whether they use GPUs: what SCALE leaves open is read off the cluster.

    virtual_workers: which an elastic run has already, and so as many workers at most
    """
    import ray

    num_gpus = ray.cluster_resources().get("GPU", 0.0)
    fitting = int(num_gpus // scale.GPUS_PER_WORKER)
    needed = scale.MIN_WORKERS or scale.NUM_WORKERS or 1
    use_gpu = fitting >= needed if scale.USE_GPU == "auto" else bool(scale.USE_GPU)
    if scale.NUM_WORKERS is None and scale.MIN_WORKERS is not None:
        fit = virtual_workers or fitting_workers(resources_per_worker(scale, use_gpu))
        return max(scale.MIN_WORKERS, fit), use_gpu
    return scale.NUM_WORKERS or (fitting if use_gpu and fitting else 1), use_gpu


def check_resources(num_workers: int, per_worker: dict[str, float]) -> None:
    """PreflightError if this cluster could never hold the workers; Ray itself would wait for ever."""
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

    return sum(count_fitting(node["Resources"], per_worker) for node in ray.nodes() if node["Alive"])


def count_fitting(resources: dict[str, float], per_worker: dict[str, float]) -> int:
    """How many workers fit into these resources."""
    return min(int(resources.get(name, 0.0) / need + 1e-9) for name, need in per_worker.items() if need > 0)


def node_address(node_id: str) -> str:
    """The address of a node, for people."""
    import ray

    return next((str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] == node_id), node_id)


def free_workers(per_worker: dict[str, float]) -> int:
    """How many workers the cluster has room for at this moment, at most."""
    import ray

    return count_fitting(ray.available_resources(), per_worker)


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
        probe = ray.remote(num_cpus=0, max_retries=0)(_can_write_beside)
        answers = [
            probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)).remote(
                str(marker)
            )
            for n in others
        ]
        ray.wait(answers, num_returns=len(answers), timeout=60)
        unreachable = [
            node["NodeManagerAddress"]
            for node, answer in zip(others, answers, strict=True)
            if not sees_or_is_gone(answer)
        ]
    finally:
        marker.unlink(missing_ok=True)
    if unreachable:
        raise PreflightError(
            f"the run folder {run_uri} is not visible on {len(unreachable)} of {len(others) + 1} nodes "
            f"({', '.join(unreachable[:5])}). Give --output a folder that all nodes share (NFS) or a URI such as s3://bucket/path"
        )


def sees_or_is_gone(answer: Any) -> bool:
    """What a node has said; True if it has died, of which Ray knows only after a while: it is no place to train."""
    import ray
    from ray.exceptions import NodeDiedError, TaskUnschedulableError, WorkerCrashedError

    try:
        return bool(ray.get(answer, timeout=1))
    except (NodeDiedError, TaskUnschedulableError, WorkerCrashedError):
        return True


def _can_write_beside(marker: str) -> bool:
    return Path(marker).exists() and os.access(Path(marker).parent, os.W_OK)


def wait_reason(per_worker: dict[str, float], num_workers: int) -> str:
    """What the workers are waiting for on a busy cluster, for the live line."""
    import ray

    free = ray.available_resources()
    parts = [
        f"{name} {need * num_workers:g} ({free.get(name, 0.0):g} free)" for name, need in per_worker.items() if need
    ]
    return f"the cluster has no room yet: {', '.join(parts)}"
