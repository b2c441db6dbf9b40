"""What a trial writes down of each step: digests of batches, losses, gradients and buffers, and what objects hold."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from raytrain.data.feed import Feed, Step
from raytrain.data.loader import BatchKey
from raytrain.engine.state import RunState
from raytrain.progress import Progress
from raytrain.proof.held import held_by
from raytrain.training.contract import Part
from raytrain.training.recorder import Taken
from raytrain.training.sameness import fields_of, hash_of


class SeenFeed(Feed):
    """Another feed's batches, of which an observer is told; nothing is evaluated."""

    def __init__(self, feed: Feed, observer: Observer) -> None:
        vars(self).update(vars(feed))
        self.evaluates_after = lambda epoch: False
        self._observer = observer

    def epoch_steps(self, progress: Progress) -> Iterator[Step]:
        for step in super().epoch_steps(progress):
            self._observer.step_begins(step)
            yield step

    def fetch(self, key: BatchKey) -> Any:
        batch = super().fetch(key)
        self._observer.batch_came(key, batch)
        return batch


class Observer:
    """In the recorder's place: it writes down instead of saving, and ends the run after `last` steps.

    What task, data set and model hold besides is written down at the start, after 1, 2, 4, 8, ... steps, around half
    and at the end. Gradients are in the order of their arrival, so that the first that differs is nearest to the loss.

    at_half: called once half of the steps are taken, of a trial that takes them all
    """

    def __init__(self, run: RunState, feed: Feed, last: int) -> None:
        self.run, self.feed, self.last, self.half = run, feed, last, last // 2
        self.at_half: Callable[[], Any] = lambda: None
        self._steps: dict[int, dict[str, Any]] = {}
        self._held: dict[int, dict[str, str]] = {}
        self._weights: dict[int, dict[str, str]] = {}
        self._under_way: dict[str, Any] = {}
        self._places: Iterator[int] = iter(())
        self._virtual_worker = 0
        self._bad_steps = 0
        run.engine.may_join = False  # each virtual worker's gradient is looked at
        for name, param in run.model.named_parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(functools.partial(self._gradient_came, name))

    def begin(self) -> None:
        """The run stands where the trial begins."""
        self._look()

    def step_begins(self, step: Step) -> None:
        self._under_way = {"batches": [], "losses": [], "gradients": {}}
        self._places = (v for v, keys in step.micro_batches.items() for _ in keys)

    def batch_came(self, key: BatchKey, batch: Any) -> None:
        self._virtual_worker = next(self._places)
        fields = {field: by_sample(value, len(key.ids)) for field, value in fields_of(batch)}
        where = {"virtual_worker": self._virtual_worker, "epoch": key.epoch, "ids": list(key.ids)}
        self._under_way["batches"].append({**where, "fields": fields})

    def _gradient_came(self, name: str, param: torch.Tensor) -> None:
        """Of a virtual worker's micro-batches the last one leaves what counts: their sum."""
        assert param.grad is not None, "it has just been accumulated"
        grad = param.grad if param.grad.layout is torch.strided else param.grad.to_dense()
        self._under_way["gradients"].setdefault(str(self._virtual_worker), {})[name] = hash_of(grad)

    # What the loop calls

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        yield

    def wishes(self) -> tuple[bool, bool]:
        return False, False

    def terms(self, parts: Mapping[int, Sequence[Part]]) -> None:
        return None

    def stepped(self, step: Step, taken: Taken) -> bool:
        done = self.run.progress.step
        self._bad_steps += taken.stepped.bad_step is not None
        for v, parts in taken.parts.items():
            self._under_way["losses"] += [
                {"virtual_worker": v, "loss": float(part.loss.detach()).hex()} for part in parts
            ]
        buffers = {name: digest for name, tensor in self._named_buffers() if (digest := hash_of(tensor)) is not None}
        self._steps[done] = {**self._under_way, "buffers": buffers}
        if done in (self.half, self.half + 1, self.last) or done & (done - 1) == 0:
            self._look()
        if done == self.half:
            self.at_half()
        return done < self.last

    def epoch_done(self, is_whole: bool, evaluates: bool) -> None: ...

    def trace(self, notes: Sequence[str], asked: Sequence[str]) -> dict[str, Any]:
        """All of it, as JSON has it."""
        self.feed.tell_changes()
        return {
            "last": self.last,
            "half": self.half,
            "bad_steps": self._bad_steps,
            "device": self.run.world.device.type,
            "gpus": torch.cuda.device_count(),
            "num_samples": self.run.plan.num_samples,
            "own_of_datasets": self.run.own.of_datasets,
            "classes": {
                "model": type(self.run.model).__name__,
                "task": type(self.feed.task).__name__,
                "data": type(self.feed.datasets["train"]).__name__,
            },
            "steps": self._steps,
            "held": self._held,
            "weights": self._weights,
            "notes": [*notes, *self.feed.task.take_notes()],
            "asked": list(asked),
        }

    def _look(self) -> None:
        done = self.run.progress.step
        self._held[done] = held_by(self.run.model, self.feed.task, self.feed.datasets["train"])
        tensors = {**dict(self.run.model.named_parameters()), **dict(self.run.model.named_buffers())}
        digests = {name: hash_of(tensor) for name, tensor in tensors.items()}
        self._weights[done] = {name: digest for name, digest in digests.items() if digest is not None}

    def _named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Those that are there now, and parameters that no gradient reaches."""
        yield from self.run.model.named_buffers()
        yield from ((name, param) for name, param in self.run.model.named_parameters() if not param.requires_grad)


def by_sample(value: Any, samples: int) -> Any:
    """A digest of each sample's row, where there is one for each; else of all."""
    if isinstance(value, torch.Tensor) and value.layout is torch.strided and value.dim() and len(value) == samples:
        return [hash_of(row) for row in value.detach().cpu()]
    return hash_of(value)
