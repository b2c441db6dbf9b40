"""The cluster under a run: the processes that it starts with, and that it is left as it was found."""

from __future__ import annotations

import os

import pytest

from raytrain.cluster import cluster
from raytrain.config.sections import Scale
from raytrain.errors import PreflightError


@pytest.mark.parametrize(("cpus_per_worker", "num_cpus"), [(0.01, None), (1.0, 10_000)])
def test_more_workers_than_cores_do_not_wait_for_processes_that_never_start(
    cpus_per_worker: float, num_cpus: int | None
) -> None:
    """Four workers of half a CPU on two cores took 54 s to the first step, not 12: Ray started but two ahead."""
    cores = len(os.sched_getaffinity(0))
    asked = Scale(NUM_WORKERS=2 * cores, CPUS_PER_WORKER=cpus_per_worker)
    assert cluster.prestart_for(asked, num_cpus).count == cores


@pytest.mark.parametrize(("scale", "count"), [({"NUM_WORKERS": 8}, 1), ({}, 1), ({"NUM_WORKERS": 8, "MIN": 2}, 0)])
def test_an_elastic_run_begins_with_processes_for_those_that_fit(scale: dict[str, int], count: int) -> None:
    asked = Scale(MIN_WORKERS=scale.pop("MIN", 1), CPUS_PER_WORKER=3.0, **scale)
    assert cluster.prestart_for(asked, num_cpus=4).count == count


@pytest.mark.ray
def test_a_connected_process_uses_its_cluster_and_leaves_it_standing(ray_address: str) -> None:
    import ray

    with cluster.starting(None) as joined:
        joined.connect()
        assert ray.get_runtime_context().gcs_address == ray_address
    assert ray.is_initialized()
    with cluster.starting(ray_address) as joined, pytest.raises(PreflightError, match="already connected to Ray"):
        joined.connect()
