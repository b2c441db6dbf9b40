"""Data set and order in, the micro-batches of each next step out, on the device.

One set of loader workers serves the whole run: the stream of batch keys (which samples, of which
split and epoch) is known in advance, training and evaluation alike, so the loader reads ahead
across epochs and nothing is started twice (the heritage keeps a second, unused set).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from raytrain.data.dropped_samples import DroppedSamples
from raytrain.data.loader import BatchKey, KeyedBatches, Loaded, check_loader_workers, end_loader, start_loader
from raytrain.data.module_values import ModuleValues, differing_note
from raytrain.data.sampler import cut, epoch_order, step_samples
from raytrain.data.split import HEAD_BYTES
from raytrain.data.transfer import DeviceTransfer
from raytrain.engine.attributes import Watch
from raytrain.engine.object_graph import value_of, walk
from raytrain.engine.randomness import Randomness
from raytrain.engine.world import World
from raytrain.errors import DataError, LostLoaderError, listed
from raytrain.progress import Plan, Progress
from raytrain.task import Task


@dataclasses.dataclass(frozen=True)
class Step:
    """The work of one step on this process.

    micro_batches: virtual worker -> the keys of its micro-batches, in order
    consumed:      samples that the step takes over all virtual workers
    """

    micro_batches: dict[int, list[BatchKey]]
    consumed: int

    @functools.cached_property
    def last(self) -> tuple[int, int]:
        """Virtual worker and number of the last micro-batch."""
        last = max(self.micro_batches)
        return last, len(self.micro_batches[last]) - 1


class Feed:
    """The batches of a run from a given progress on, for the virtual workers of this process.

    evaluates_after(epoch) says whether the validation split is read once that many epochs are
    finished; it must answer as the loop does, since the loader reads ahead.

    beat:        told what this rank is at, by the names of keeper.heartbeat.PHASES
    current:     the key of the batch that was asked for last
    stacks_path: where loader workers write their stacks when they are asked
    notes:       what a user should know of the data, to be taken out
    """

    def __init__(
        self,
        task: Task,
        datasets: dict[str, Any],
        plan: Plan,
        world: World,
        loader_cfg: Any,
        seed: int,
        evaluates_after: Callable[[int], bool],
        channels_last: bool = False,
    ) -> None:
        self.task, self.datasets, self.plan, self.world = task, datasets, plan, world
        self.loader_cfg, self.seed, self.evaluates_after = loader_cfg, seed, evaluates_after
        self._transfer = DeviceTransfer(task, world.device, channels_last)
        self._batches: Iterator[Loaded] | None = None
        self._reader: KeyedBatches | None = None
        self._delivery = None if type(task).to_device is Task.to_device else Randomness(task=task)
        self._held: dict[str, Any] = {}
        self._watch = Watch()
        self._dropped = None if type(task).collate is Task.collate else DroppedSamples()
        self._wait_s = 0.0
        self._noted: set[str] = set()
        self._differing: set[str] = set()
        self.notes: list[str] = []
        self.current: BatchKey | None = None
        self.beat: Callable[[str], None] = lambda phase: None
        self.stacks_path: str | None = None

    def start(
        self,
        progress: Progress,
        evaluate_first: bool = False,
        trains: bool = True,
        probes: Sequence[BatchKey] = (),
    ) -> None:
        """Begin to read ahead from `progress`; loader workers start here.

        trains: whether training follows the evaluation, or the start
        probes: batches that come before all others, only to be looked at: by `host_batch`
        """
        self.beat("data")
        keys = itertools.chain(probes, self._keys(progress, evaluate_first, trains))
        workers = self.loader_cfg.WORKERS
        check_loader_workers(workers, len(os.sched_getaffinity(0)))
        values = ModuleValues(self.task, self.datasets) if workers else None
        reader = KeyedBatches(self.datasets, self.task, self.seed, values)
        if workers == 0 and self.world.device.type == "cpu":  # nothing to read ahead with, nothing to pin
            self._reader = reader
            return
        self._held = self._held_values()
        pins = self.world.device.type == "cuda"
        self._batches = start_loader(reader, keys, self.loader_cfg, pins, self.stacks_path)

    def epoch_steps(self, progress: Progress) -> Iterator[Step]:
        """What is left of the epoch that `progress` stands in, for the loop."""
        if self._batches is not None and self.loader_cfg.WORKERS:
            self._follow_changes(progress)
        else:
            self._tell([path for path in self._changed() if path.startswith("train")], "training goes on with it")
        yield from self._steps(progress)
        if self.loader_cfg.WORKERS == 0:  # what making samples changes is told by data/changes.py
            self._held = self._held_values() if self._watch.epoch_begins() else {}

    def _steps(self, progress: Progress) -> Iterator[Step]:
        plan, epoch = self.plan, progress.epoch
        order = epoch_order(plan.num_samples, self.seed, epoch, self.loader_cfg.SHUFFLE)
        for shares in step_samples(order, progress.cursor, plan):
            at = plan.standing(progress)
            micro_batches = {
                v: [BatchKey("train", epoch, ids, at) for ids in cut(shares[v].tolist(), plan.batch_size)]
                for v in self.world.block
            }
            yield Step(micro_batches, shares.numel())
            progress = plan.advanced(progress, shares.numel())

    def validation_keys(self, progress: Progress) -> Iterator[BatchKey]:
        """This process's part of the validation split: every size-th batch of the data set's order.

        What a batch holds does not depend on the number of processes, so neither do predictions.
        """
        at = self.plan.standing(progress)
        batches = cut(range(len(self.datasets["val"])), self.plan.batch_size)
        return (
            BatchKey("val", progress.epoch, ids, at)
            for ids in itertools.islice(batches, self.world.rank, None, self.world.size)
        )

    def fetch(self, key: BatchKey) -> Any:
        """The batch of `key`, the next one of the stream, on the device."""
        self.task.take_progress(key.progress)
        self.beat("data" if key.split == "train" else "eval")
        began = time.perf_counter()
        batch = self.host_batch(key)
        if self._dropped is not None and key.split == "train":
            self._dropped.see(len(key.ids), batch)
        if self._delivery is not None:  # the task's own, which may augment
            self._delivery.seed(self.seed, "to_device", key.split, key.epoch, key.ids[0])
        batch = self._transfer.to_device(batch)
        self._wait_s += time.perf_counter() - began
        self.beat("forward" if key.split == "train" else "eval")
        return batch

    def host_batch(self, key: BatchKey) -> Any:
        """The batch of `key`, the next one of the stream, as it was loaded."""
        self.current = key
        if self._reader is not None:
            loaded = self._reader[key]
        else:
            assert self._batches is not None, "Feed.start() comes first"
            loaded = self._next(self._batches)
        batch_key, batch, notes, task_notes, differing = loaded  # a list, where it has come through pinned memory
        self._tell_differing(differing)
        for note in task_notes:
            self.task.note(note)
        if isinstance(batch, DataError):
            raise batch
        assert batch_key == key, f"the loop asked for {key}, the stream holds {batch_key}"
        if notes and key.split not in self._noted:  # each loader worker would say it of another sample
            self._noted.add(key.split)
            self.notes += notes
        return batch

    def _tell_differing(self, differing: Sequence[str]) -> None:
        """Each loader worker says it, for each split; a value may be another one in each of them."""
        new = [each for each in differing if each.partition(" ")[0] not in self._differing]
        self._differing |= {each.partition(" ")[0] for each in new}
        if new:
            self.notes.append(differing_note(new))

    def _follow_changes(self, progress: Progress) -> None:
        """Start the loader workers again if what their data sets hold has been changed in this process.

        They have copies, as they were; torch's loader gets new ones each epoch, and so tasks come to rely on it.
        """
        changed = self._changed()
        if not changed:
            return
        try:
            pickle.dumps((self.datasets, self.task))
        except Exception as error:
            self._held, came_of_it = self._held_values(), f"loader workers cannot be given it ({error})"
        else:
            self.close()
            self.start(progress)
            came_of_it = "loader workers were started again with it"
        self._tell(changed, came_of_it)

    def _tell(self, changed: list[str], came_of_it: str) -> None:
        if changed and "changed" not in self._noted:
            self._noted.add("changed")
            self.notes.append(
                f"data set: {listed(changed)} was changed in the training process; {came_of_it}. No checkpoint holds "
                "it, and other ranks may lack it: change it in the data set's set_epoch(epoch)"
            )

    def _changed(self) -> list[str]:
        """Paths of what the data sets held when it was last looked, and hold otherwise now."""
        now = self._held_values() if self._held else {}
        return [path for path, value in self._held.items() if path in now and now[path] != value]

    def _held_values(self) -> dict[str, Any]:
        """What the data sets hold, by its path: numbers, texts, heads of arrays, lengths of lists, kinds of objects.

        Not what is in dicts and sets besides: entries come and go there as samples are made (a cache).
        """
        held = walk(self.datasets)
        return {p: value_of(v, HEAD_BYTES) for p, v in held if v is not None and not isinstance(v, (dict, set))}

    def _next(self, batches: Iterator[Loaded]) -> Loaded:
        try:
            return next(batches)
        except (RuntimeError, ConnectionError, EOFError) as error:
            # The memory of a batch in the queue is had from the worker that made it: then its connection is lost.
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise LostLoaderError(
                f"a loader worker died: {error}\n\n"
                "Most often the machine ran out of memory or of /dev/shm (lower LOADER.WORKERS or LOADER.PREFETCH),\n"
                "or native code crashed (with --workers 0 it does so in the training process)"
            ) from error

    def take_wait_s(self) -> float:
        """Seconds spent in fetch since this was last asked."""
        wait_s, self._wait_s = self._wait_s, 0.0
        return wait_s

    def tell_dropped(self, is_weighted: bool) -> None:
        """The task notes once that its collate drops samples, if that is seen.

        is_weighted: whether it says itself how much a batch counts
        """
        what = self._dropped.described() if self._dropped is not None and not is_weighted else None
        if what is not None:
            self._dropped = None
            self.task.note(
                f"a batch holds {what}: {type(self.task).__name__}.collate drops some. Nothing is trained on them, and "
                "the loss counts in its step as the mean of all. Let the data set have those samples alone that can be "
                "loaded, or return ModelReturn(loss, weight=samples in the batch)"
            )

    def tell_changes(self) -> None:
        """The task notes what has changed in data sets that are read here; loader workers do so when they go on."""
        if self._reader is not None:
            self._reader.changes.tell()

    def close(self) -> None:
        """End the loader workers."""
        batches, self._batches, self._reader = self._batches, None, None
        end_loader(batches)

    def _keys(self, progress: Progress, evaluate_first: bool, trains: bool) -> Iterator[BatchKey]:
        if evaluate_first:
            yield from self.validation_keys(progress)
        while trains and not self.plan.finished(progress):
            for step in self._steps(progress):
                for keys in step.micro_batches.values():
                    yield from keys
                progress = self.plan.advanced(progress, step.consumed)
            if self.evaluates_after(progress.epoch):
                yield from self.validation_keys(progress)
