"""Processes, the virtual workers they host, and the collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import Pair

from raytrain.engine.world import World
from raytrain.errors import ConfigError


@pytest.mark.parametrize("virtual_workers", [1, 2, 3, 5, 8])
def test_every_virtual_worker_has_one_host_in_blocks_that_differ_by_one_at_most(virtual_workers: int) -> None:
    for size in range(1, virtual_workers + 1):
        blocks = [World(rank, size, virtual_workers).block for rank in range(size)]
        assert [v for block in blocks for v in block] == list(range(virtual_workers))
        assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


def test_more_processes_than_virtual_workers_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"NUM_WORKERS is 3.*2 virtual workers.*at most 2 workers"):
        World(rank=0, size=3, virtual_workers=2)


def test_alone_every_collective_gives_back_what_it_got() -> None:
    world = World()
    tensor = torch.tensor([1.0, 2.0])
    world.broadcast_(tensor)
    assert tensor.tolist() == [1.0, 2.0]
    assert world.broadcast_object({"a": 1}) == {"a": 1}
    assert world.gather_objects("x") == ["x"]
    assert world.is_first


def collectives(rank: int) -> dict[str, Any]:
    world = World.joined(3, torch.device("cpu"))
    summed = torch.tensor([1e8, 1.0 + rank, 1 / 3])
    world.begin_sum(summed).wait()
    first = torch.arange(3, dtype=torch.uint8) + 10 * rank
    world.broadcast_(first)
    return {
        "world": (world.rank, world.size, list(world.block), world.is_first, world.objects),
        "sum": summed.tolist(),
        "broadcast": first.tolist(),
        "object": world.broadcast_object({"rank": rank} if rank == 0 else None),
        "gathered": world.gather_objects((rank, torch.full((2,), float(rank)))),
    }


def test_two_processes_agree(pair: Pair) -> None:
    first, second = pair.run(collectives)
    assert first["world"] == (0, 2, [0, 1], True, None) and second["world"] == (1, 2, [2], False, None)
    assert first["sum"] == second["sum"] == torch.tensor([2e8, 3.0, 2 / 3]).tolist()
    assert first["broadcast"] == second["broadcast"] == [0, 1, 2]
    assert first["object"] == second["object"] == {"rank": 0}
    assert [(rank, t.tolist()) for rank, t in first["gathered"]] == [(0, [0.0, 0.0]), (1, [1.0, 1.0])]
    assert second["gathered"] == []
