"""Where this process stands among the others, and the few collectives that training needs."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from raytrain.engine.tree import block
from raytrain.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class World:
    """One process of `size`, hosting a contiguous block of the run's virtual workers.

    `objects` is the process group for host-side objects (gloo also where tensors go by NCCL).
    """

    rank: int = 0
    size: int = 1
    virtual_workers: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    objects: Any = None

    def __post_init__(self) -> None:
        if self.size > self.virtual_workers:
            raise ConfigError(
                f"SCALE.NUM_WORKERS is {self.size}, but this run has {self.virtual_workers} virtual workers and each "
                f"worker process needs at least one; use at most {self.virtual_workers} workers, "
                f"or start a new run with SCALE.VIRTUAL_WORKERS: {self.size}"
            )

    @classmethod
    def joined(cls, virtual_workers: int, device: torch.device) -> World:
        """Collective. The world of the torch process group that already stands."""
        objects = dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None
        return cls(dist.get_rank(), dist.get_world_size(), virtual_workers, device, objects)

    @property
    def block(self) -> range:
        """The virtual workers that this process hosts."""
        return block(self.rank, self.size, self.virtual_workers)

    @property
    def is_first(self) -> bool:
        """Rank 0 reads clocks, disks and journals for all."""
        return self.rank == 0

    def begin_sum(self, tensor: torch.Tensor) -> Any:
        """Collective. `tensor` becomes its sum over all processes; `wait()` on what is returned before it is read."""
        return dist.all_reduce(tensor, async_op=True)

    def begin_exchange(self, received: torch.Tensor, sent: torch.Tensor, counts: list[int]) -> Any:
        """Collective. Each process gets its share of what every other sends; `wait()` as above.

        sent:     (n,), in as many equal shares as there are processes
        received: what comes from each, one after the other: by rank so many numbers as `counts` says
        """
        return dist.all_to_all_single(received, sent, counts, [len(sent) // self.size] * self.size, async_op=True)

    def begin_gather(self, received: torch.Tensor, sent: torch.Tensor) -> Any:
        """Collective. Everyone gets what every process sends, in the order of ranks; `wait()` as above."""
        return dist.all_gather_single(received, sent, async_op=True)

    def gather_(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Collective. The same, waited for."""
        if self.size > 1:
            dist.all_gather_single(received, sent)
        else:
            received.copy_(sent)

    def broadcast_(self, tensor: torch.Tensor) -> None:
        """Collective. `tensor` becomes rank 0's."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """Collective. The `value` of one rank, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=source, group=self.objects)
        return values[0]

    def all_objects(self, value: Any) -> list[Any]:
        """Collective. Every rank's `value` by rank, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.objects)
        return values

    def gather_objects(self, value: Any) -> list[Any]:
        """Collective. Every rank's `value` by rank, on rank 0; an empty list elsewhere."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_first else None
        dist.gather_object(value, values, dst=0, group=self.objects)
        return values or []
