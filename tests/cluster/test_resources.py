"""What a cluster can hold is counted before a run starts, and said where it is too little."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytrain.cluster import resources
from raytrain.config.sections import Scale
from raytrain.errors import PreflightError


def test_a_worker_reserves_what_scale_says() -> None:
    assert resources.resources_per_worker(Scale(), False) == {"CPU": 1.0}
    asked = Scale(CPUS_PER_WORKER=0.5, GPUS_PER_WORKER=2.0, RESOURCES={"fast_disk": 1.0})
    assert resources.resources_per_worker(asked, True) == {"CPU": 0.5, "GPU": 2.0, "fast_disk": 1.0}


@pytest.mark.parametrize(
    ("has", "needs", "fits"),
    [
        ({"CPU": 8.0}, {"CPU": 1.0}, 8),
        ({"CPU": 8.0}, {"CPU": 3.0}, 2),
        ({"CPU": 1.0}, {"CPU": 0.1}, 10),  # 1 / 0.1 is 9.99... in floating point
        ({"CPU": 8.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 0.5}, 2),
        ({"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}, 0),
        ({"CPU": 8.0}, {"CPU": 1.0, "fast_disk": 0.0}, 8),
    ],
)
def test_how_many_workers_fit(has: dict[str, float], needs: dict[str, float], fits: int) -> None:
    assert resources.count_fitting(has, needs) == fits


@pytest.mark.ray
def test_what_the_cluster_can_never_hold_is_an_error_in_place_of_a_wait_without_end(ray_address: str) -> None:
    resources.check_resources(8, {"CPU": 1.0})
    with pytest.raises(PreflightError) as raised:
        resources.check_resources(9, {"CPU": 1.0})
    assert str(raised.value).split("\n") == [
        "this cluster of 1 node can never hold 9 workers, only 8:",
        "  CPU: 9 wanted (9 x 1), the cluster has 8",
        "What to do: use fewer workers (--num_workers), or less each (--set SCALE.CPUS_PER_WORKER 0.5)",
    ]


@pytest.mark.ray
def test_resources_that_do_not_divide_the_nodes_are_counted_by_node(ray_address: str) -> None:
    resources.check_resources(2, {"CPU": 3.0})
    with pytest.raises(PreflightError, match="never hold 3 workers, only 2"):
        resources.check_resources(3, {"CPU": 2.9})


@pytest.mark.ray
def test_gpus_that_are_not_there_and_custom_resources_are_named(ray_address: str) -> None:
    with pytest.raises(PreflightError, match=r"GPU: 2 wanted \(2 x 1\), the cluster has 0\n.*--no_gpu"):
        resources.check_resources(2, {"CPU": 1.0, "GPU": 1.0})
    with pytest.raises(PreflightError, match=r"fast_disk: 1 wanted \(1 x 1\), the cluster has 0"):
        resources.check_resources(1, {"CPU": 1.0, "fast_disk": 1.0})


@pytest.mark.ray
def test_what_scale_leaves_open_is_read_off_the_cluster(ray_address: str) -> None:
    assert resources.resolve_workers(Scale()) == (1, False)
    assert resources.resolve_workers(Scale(NUM_WORKERS=3)) == (3, False)
    assert resources.resolve_workers(Scale(NUM_WORKERS=2, USE_GPU=True)) == (2, True)
    assert resources.resolve_workers(Scale(USE_GPU=False)) == (1, False)


@pytest.mark.ray
def test_an_elastic_run_has_as_many_workers_at_most_as_fit_or_as_it_has_virtual_ones(ray_address: str) -> None:
    assert resources.resolve_workers(Scale(MIN_WORKERS=2)) == (8, False)
    assert resources.resolve_workers(Scale(MIN_WORKERS=2, CPUS_PER_WORKER=3.0)) == (2, False)
    assert resources.resolve_workers(Scale(MIN_WORKERS=9)) == (9, False), "which check_resources then refuses"
    assert resources.resolve_workers(Scale(MIN_WORKERS=2, NUM_WORKERS=3)) == (3, False)
    assert resources.resolve_workers(Scale(MIN_WORKERS=2), virtual_workers=16) == (16, False)


@pytest.mark.ray
def test_the_run_folder_is_reachable_where_all_is_one_machine(ray_address: str, tmp_path: Path) -> None:
    resources.check_reachable(str(tmp_path))
    resources.check_reachable("s3://bucket/run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_a_run_that_waits_says_for_what(ray_address: str) -> None:
    assert resources.free_workers({"CPU": 2.0}) == 4
    assert resources.wait_reason({"CPU": 2.0}, 6) == "the cluster has no room yet: CPU 12 (8 free)"
