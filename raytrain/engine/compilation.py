"""torch.compile for a run's model: tried out before a step depends on it, and given up with a reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from raytrain.batch import map_tensors, tensors_of
from raytrain.engine.world import World
from raytrain.errors import RaytrainError

MAX_SHAPES = 64  # of batches with code of their own, where torch allows 8; what comes later runs eagerly


class Compilation:
    """A model whose forward pass is compiled, until the compiler fails: then it is as it was, for good.

    Each shape of batch gets code made for it alone. Code for any shape would be made once too, but from
    what is seen first, so that a resumed run would round otherwise than one that was never stopped.

    why_eager: what the compiler failed at
    notes:     lines for the journal, to be taken out
    """

    def __init__(self, model: torch.nn.Module, world: World, cuda_graphs: bool) -> None:
        self.model, self.world = model, world
        self.why_eager: str | None = None
        self.notes: list[str] = []
        self._tried: set[Any] = set()
        self._agreed = False
        # Not model.compile(): it does nothing, without a word, where forward is torch's own, as nn.Sequential's.
        compiled: Any = torch.compile  # its stubs lack the last two options
        model.forward = compiled(
            model.forward,
            dynamic=False,
            mode="reduce-overhead" if cuda_graphs else None,
            recompile_limit=MAX_SHAPES,
            isolate_recompiles=True,
        )

    def try_out(self, batch: Any, rehearse: Callable[[Any], None]) -> None:
        """Have the compiler meet a batch of this shape where nothing is lost if it fails.

        rehearse: does with a copy of the batch what will be done with it. It may change random state, which is
                  keyed, and buffers (BatchNorm statistics), which are put back; nothing else.
        Collective at a process's first batch of training: where one compiler fails, all go on eagerly.
        """
        key = (self.model.training, *((t.shape, t.dtype, t.stride()) for t in tensors_of(batch)))
        if self.why_eager is None and key not in self._tried:
            self._tried.add(key)
            self._rehearse(partial(rehearse, map_tensors(torch.clone, batch)))
        if self.model.training and not self._agreed:
            self._agreed = True
            failed = [reason for reason in self.world.all_objects(self.why_eager) if reason is not None]
            if failed and self.why_eager is None:
                self._give_up(failed[0])

    def _rehearse(self, rehearse: Callable[[], None]) -> None:
        before = [
            (module, name, buffer, buffer.clone())
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        try:
            rehearse()
        except RaytrainError:
            raise
        except Exception as error:  # whatever was not the compiler's comes again, without it
            self._give_up(f"{type(error).__name__}: {' '.join(str(error).split()):.300}")
        finally:
            with torch.no_grad():
                for module, name, buffer, value in before:
                    buffer.copy_(value)
                    module._buffers[name] = buffer

    def _give_up(self, reason: str) -> None:
        self.why_eager = reason
        del self.model.forward  # the instance's; the class's is what it was
        note = f"COMPILE is given up, the model runs eagerly: {reason}"
        self.notes.append(note)
        if not self.world.is_first:  # whose journal goes nowhere
            logging.getLogger("raytrain").warning(note)


def open_compilation(
    model: torch.nn.Module, optim_cfg: Any, world: World, micro_batches: int
) -> tuple[Compilation | None, list[str]]:
    """What OPTIMIZATION.COMPILE and CUDA_GRAPHS ask for, and a line for each thing of it that cannot be.

    micro_batches: that this process takes in a step
    """
    if optim_cfg.SYNC_BN and world.size > 1:
        return None, ["COMPILE is given up, the model runs eagerly: SYNC_BN talks to the other workers in its midst"]
    graphs, why = optim_cfg.CUDA_GRAPHS, None
    if graphs and world.device.type != "cuda":
        why = f"the device is {world.device.type}"
    elif graphs and micro_batches > 1:
        why = f"this process adds up {micro_batches} micro-batches a step, and a graph keeps the gradients of one"
    try:
        compilation = Compilation(model, world, graphs and why is None)
    except RuntimeError as error:  # torch.compile does not know this Python or platform
        return None, [f"COMPILE is given up, the model runs eagerly: {error}"]
    return compilation, [f"CUDA_GRAPHS is given up, the model is compiled without: {why}"] if why else []
