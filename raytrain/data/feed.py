"""Data set and order in, the micro-batches of each next step out, on the device.

One set of loader workers serves the whole run: the stream of batch keys (which samples, of which
split and epoch) is known in advance, training and evaluation alike, so the loader reads ahead
across epochs and nothing is started twice (the heritage keeps a second, unused set, D18).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing.queues
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_convert

from raytrain.data.sampler import cut, epoch_order, step_samples
from raytrain.data.transfer import Delivery
from raytrain.engine.randomness import random_state, seed_all
from raytrain.engine.world import World
from raytrain.errors import DataError, LostLoaderError, PreflightError, TaskError
from raytrain.failure import users_traceback
from raytrain.progress import Plan, Progress
from raytrain.storage.processes import write_stacks_to
from raytrain.task import Task

SIGNALS = (signal.SIGINT, signal.SIGTERM)
MAX_SAMPLES = 100_000_000  # 3 GB for the order of an epoch: shuffled and dealt, for the loop and for what reads ahead
LOADERS_PER_CPU = 16  # more than one, since loading may be waiting


@dataclasses.dataclass(frozen=True)
class BatchKey:
    """What a loader worker is asked for."""

    split: str
    epoch: int
    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """The work of one step on this process.

    micro_batches: virtual worker -> the keys of its micro-batches, in order
    consumed:      samples that the step takes over all virtual workers
    """

    micro_batches: dict[int, list[BatchKey]]
    consumed: int


class KeyedBatches(Dataset[Any]):
    """Batches by key; randomness in a sample depends on (seed, epoch, sample id) alone."""

    def __init__(self, datasets: dict[str, Any], task: Task, seed: int) -> None:
        self.datasets = datasets
        self.task = task
        self.seed = seed
        self.epochs: dict[str, int] = {}

    def __getitem__(self, key: BatchKey) -> tuple[BatchKey, Any]:
        """The key and its batch, or a DataError in the batch's place (raised in the training process)."""
        dataset = self.datasets[key.split]
        where = f"data set {key.split!r}"
        seeded, state = self.task.random_samples, None
        try:
            if self.epochs.get(key.split) != key.epoch:
                self.epochs[key.split] = key.epoch
                if hasattr(dataset, "set_epoch"):
                    dataset.set_epoch(key.epoch)
                state = None if seeded else random_state()
            samples = []
            for sample_id in key.ids:
                where = f"sample {sample_id} of data set {key.split!r}"
                if seeded:
                    seed_all(self.seed, "sample", key.split, key.epoch, sample_id)
                samples.append(dataset[sample_id])
            if state is not None and random_state() != state:
                told = f"a sample of data set {key.split!r} drew random numbers, which were not seeded for it"
                return key, DataError(f"{told}: set {type(self.task).__name__}.random_samples to True")
            where = f"collate of {len(key.ids)} samples of data set {key.split!r}"
            if type(self.task).collate is Task.collate:  # draws nothing, and gives tensors
                return key, self.task.collate(samples)
            seed_all(self.seed, "collate", key.split, key.epoch, key.ids[0])
            return key, default_convert(self.task.collate(samples))
        except Exception as error:
            told = f"{where}: {type(error).__name__}: {error}"
            if where.startswith("collate") and type(self.task).collate is Task.collate:
                named = type(self.task).__name__
                return key, DataError(f"{told}\n\nWrite {named}.collate(samples) to make one batch of such samples")
            return key, DataError(f"{told}\n\n{users_traceback(error)}")


class Feed:
    """The batches of a run from a given progress on, for the virtual workers of this process.

    evaluate_after(epoch) says whether the validation split is read once that many epochs are
    finished; it must answer as the loop does, since the loader reads ahead.
    """

    def __init__(
        self,
        task: Task,
        datasets: dict[str, Any],
        plan: Plan,
        world: World,
        loader_cfg: Any,
        seed: int,
        evaluate_after: Callable[[int], bool],
        channels_last: bool = False,
    ) -> None:
        self.task, self.datasets, self.plan, self.world = task, datasets, plan, world
        self.loader_cfg, self.seed, self.evaluate_after = loader_cfg, seed, evaluate_after
        self._delivery = Delivery(task, world.device, channels_last)
        self._batches: Iterator[tuple[BatchKey, Any]] | None = None
        self._reader: KeyedBatches | None = None
        self._wait_s = 0.0
        self.current: BatchKey | None = None
        self.stacks_path: str | None = (
            None  # where loader workers write their stacks when they are asked (keeper/heartbeat.py)
        )

    def start(self, progress: Progress, evaluate_first: bool = False) -> None:
        """Begin to read ahead from `progress`; loader workers start here."""
        keys = self._keys(progress, evaluate_first)
        workers = self.loader_cfg.WORKERS
        check_loader_workers(workers, len(os.sched_getaffinity(0)))
        reader = KeyedBatches(self.datasets, self.task, self.seed)
        if workers == 0 and self.world.device.type == "cpu":  # nothing to read ahead with, nothing to pin
            self._reader = reader
            return
        loader: DataLoader[Any] = _QuietDataLoader(
            reader,
            batch_size=None,
            sampler=_Keys(keys),
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=self.loader_cfg.PREFETCH if workers else None,
            pin_memory=self.world.device.type == "cuda",
            multiprocessing_context=_loader_context(type(self.task).__module__) if workers else None,
            worker_init_fn=functools.partial(_init_loader_worker, self.stacks_path) if workers else None,
        )
        with _main_module_hidden(), _signals_held_back(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Got pickle error")  # the TaskError says it
            try:
                self._batches = iter(loader)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise TaskError(
                    f"{type(self.task).__name__} and its data sets go to {workers} loader workers by pickle, which "
                    f"fails: {error}. Keep lambdas, open files, locks and classes made inside functions out of them, "
                    "or load in the training process (--workers 0)"
                ) from error

    def epoch_steps(self, progress: Progress) -> Iterator[Step]:
        """What is left of the epoch that `progress` stands in."""
        plan = self.plan
        order = epoch_order(plan.num_samples, self.seed, progress.epoch, self.loader_cfg.SHUFFLE)
        for shares in step_samples(order, progress.cursor, plan):
            micro_batches = {
                v: [BatchKey("train", progress.epoch, ids) for ids in cut(shares[v].tolist(), plan.batch_size)]
                for v in self.world.block
            }
            yield Step(micro_batches, shares.numel())

    def validation_keys(self, epoch: int) -> Iterator[BatchKey]:
        """This process's part of the validation split: every size-th batch of the data set's order.

        What a batch holds does not depend on the number of processes, so neither do predictions.
        """
        batches = cut(range(len(self.datasets["val"])), self.plan.batch_size)
        return (
            BatchKey("val", epoch, ids) for ids in itertools.islice(batches, self.world.rank, None, self.world.size)
        )

    def fetch(self, key: BatchKey) -> Any:
        """The batch of `key`, the next one of the stream, on the device."""
        self.current = key
        began = time.perf_counter()
        if self._reader is not None:
            got, batch = self._reader[key]
        else:
            assert self._batches is not None, "Feed.start() comes first"
            got, batch = self._next(self._batches)
        if isinstance(batch, DataError):
            raise batch
        assert got == key, f"the loop asked for {key}, the stream holds {got}"
        batch = self._delivery.bring(batch)
        self._wait_s += time.perf_counter() - began
        return batch

    def _next(self, batches: Iterator[tuple[BatchKey, Any]]) -> tuple[BatchKey, Any]:
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

    def close(self) -> None:
        """End the loader workers."""
        batches, self._batches, self._reader = self._batches, None, None
        shutdown = getattr(batches, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()

    def _keys(self, progress: Progress, evaluate_first: bool) -> Iterator[BatchKey]:
        if evaluate_first:
            yield from self.validation_keys(progress.epoch)
        while not self.plan.finished(progress):
            for step in self.epoch_steps(progress):
                for keys in step.micro_batches.values():
                    yield from keys
            progress = Progress(progress.epoch + 1)
            if self.evaluate_after(progress.epoch):
                yield from self.validation_keys(progress.epoch)


class _Keys:
    """An iterable over keys, which is all that a DataLoader asks of its sampler."""

    def __init__(self, keys: Iterator[BatchKey]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[BatchKey]:
        return self.keys


class _QuietDataLoader(DataLoader[Any]):
    """Without torch's warning, twice, that there are fewer CPUs than loader workers."""

    def check_worker_number_rationality(self) -> None: ...


def check_loader_workers(workers: int, num_cpus: int) -> None:
    """PreflightError for more loader workers than can be of use: each takes 140 MB before its first sample."""
    most = LOADERS_PER_CPU * num_cpus
    if workers > most:
        raise PreflightError(
            f"LOADER.WORKERS is {workers}, for each worker process; on {num_cpus} CPU{'s' if num_cpus > 1 else ''} so "
            f"many load no faster and may fill the memory. Give {most} at most; {num_cpus} is a good start"
        )


def check_dataset(dataset: Any, split: str, task: Task) -> None:
    """Raise TaskError unless `dataset` is a map-style data set with samples."""
    where = f"{type(task).__name__}.build_dataset({split!r})"
    if dataset is None:
        raise TaskError(f"{where} gave None; only the validation split may be left out")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise TaskError(
            f"{where} gave {type(dataset).__name__}, which has no __getitem__: iterable data sets cannot be resumed "
            "exactly and are not supported yet; give a map-style data set with __len__ and __getitem__"
        )
    try:
        size = len(dataset)
    except Exception as error:
        raise TaskError(
            f"{where} gave {type(dataset).__name__}, whose len() fails: {type(error).__name__}: {error}"
        ) from error
    if size > MAX_SAMPLES:
        raise TaskError(
            f"{where} gave a data set of {size:,} samples; the order of an epoch is kept in memory, so {MAX_SAMPLES:,} "
            "are the most. Let len() be what an epoch shall be, and NUM_EPOCHS say how many there are"
        )
    if size == 0:
        raise TaskError(
            f"{where} gave an empty data set; there is nothing to {'train' if split == 'train' else 'evaluate'} on"
        )


def _as_it_is(batch: Any) -> Any:
    return batch


def _loader_context(task_module: str) -> Any:
    """Loader workers are forked from a clean server process that has imported torch once.

    A plain fork would inherit the threads and locks of a Ray worker and can deadlock (RAY.md F12).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "raytrain.data.feed", task_module])
    return context


@contextlib.contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Loader workers need nothing of `__main__`; importing it again would run a user's script, or Ray's, twice."""
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name, None) for name in ("__file__", "__spec__")}
    main.__spec__ = None
    if hasattr(main, "__file__"):
        del main.__file__
    try:
        yield
    finally:
        for name, value in kept.items():
            if name == "__spec__" or value is not None:
                setattr(main, name, value)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """SIGINT and SIGTERM wait: for this thread until the block ends, for loader workers until they can handle
    them, for the fork server for ever (it ends with the processes that use it)."""
    resource_tracker.ensure_running()  # when it starts its process, it lets these signals through again
    held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _init_loader_worker(stacks_path: str | None, _: int) -> None:
    """A loader worker lives as long as the training process: no longer, and through signals meant for all.

    Ctrl-C, and a SIGTERM to the whole process group, let the training process finish its step,
    for which it needs this worker. A second SIGTERM ends it.
    """
    threading.Thread(target=_end_with_parent, name="raytrain-parent-watch", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if stacks_path is not None:
        write_stacks_to(stacks_path)
    torch.set_num_threads(1)
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error_instead  # type: ignore[attr-defined]


def _send_error_instead(queue: Any, error: Exception, item: Any) -> None:
    """A batch that cannot be pickled would be lost without a word, and the loop would wait for it for ever."""
    told = f"{type(error).__name__}: {error}"
    advice = (
        "Batches go from loader workers to the training process by pickle: keep functions and open files out of them"
    )
    queue.put((item[0], (None, DataError(f"a batch cannot leave its loader worker: {told}\n\n{advice}"))))


def _end_with_parent() -> None:
    """torch's own watch looks at the parent of this process, which is the fork server and never dies first."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only called in loader workers"
    parent.join()
    os._exit(0)
