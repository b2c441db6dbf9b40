"""Loader workers: processes that make batches by key, ahead of the training."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing.queues
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from raytrain.data.changes import SampleChanges, in_loader_worker
from raytrain.data.module_values import ModuleValues, differing_note
from raytrain.data.split import Split, UnseededError
from raytrain.errors import CollateError, DataError, PreflightError, TaskError, users_traceback
from raytrain.progress import AT_START, TaskProgress
from raytrain.storage.forks import SIGNALS, at_exit, end_children, end_with_parent, handle_signals, tend_forks
from raytrain.storage.pools import when_pools_are_broken
from raytrain.storage.processes import write_stacks_to
from raytrain.storage.scratch import named_by_this_process
from raytrain.task import Task

LOADERS_PER_CPU = 16  # more than one, since loading may be waiting
FEEDER_S = 5.0  # for a thread that may still be writing to a process that was killed


@dataclasses.dataclass(frozen=True)
class BatchKey:
    """What a loader worker is asked for.

    progress: of the run, where the batch is used
    """

    split: str
    epoch: int
    ids: tuple[int, ...]
    progress: TaskProgress = AT_START


class Loaded(NamedTuple):
    """What a loader worker gives.

    batch:      or the DataError that came in its place, to be raised in the training process
    notes:      what a user should know of the data
    task_notes: what the task noted in a loader worker meanwhile
    differing:  what of the user's modules is another value there than in the training process
    """

    key: BatchKey | None
    batch: Any
    notes: Sequence[str] = ()
    task_notes: Sequence[str] = ()
    differing: Sequence[str] = ()


class KeyedBatches(Dataset[Any]):
    """Batches by key; randomness in a sample depends on (seed, epoch, sample id) alone.

    values: of modules, for loader workers to compare
    """

    def __init__(self, datasets: dict[str, Any], task: Task, seed: int, values: ModuleValues | None = None) -> None:
        self.datasets = datasets
        self.task = task
        self.seed = seed
        self._values = values or ModuleValues(task, {})
        self._splits: dict[str, Split] = {}
        self._begun: tuple[str, int] | None = None
        self._has_first = False  # whether a batch has been made since
        self.changes = SampleChanges(task, datasets)

    def __getitem__(self, key: BatchKey) -> Loaded:
        if key.split not in self._splits:  # in the process that loads: its generators are not those of another
            self._splits[key.split] = Split(key.split, self.datasets[key.split], self.task, self.seed)
            self._values.first_batch_begins()
        split = self._splits[key.split]
        self.task.take_progress(key.progress)
        try:
            batch = self._made(split, key)
        except UnseededError as error:
            batch = error
        except Exception as error:
            message, task_name = f"{split.where}: {type(error).__name__}: {error}", type(self.task).__name__
            advice, kind = users_traceback(error), DataError
            if split.where.startswith("collate"):
                kind = CollateError
                if type(self.task).collate is Task.collate:
                    advice = f"Write {task_name}.collate(samples) to make one batch of such samples"
            batch = kind(f"{message}\n\n{advice}")
        else:
            batch = self.changes.batch_made(key.split) or batch
        differing = self._values.differing(key.split)
        if differing and isinstance(batch, DataError):  # which may come of it
            batch = type(batch)(f"{batch}\n\n{differing_note(differing)}")
        task_notes = self.task.take_notes() if in_loader_worker() else []
        return Loaded(key, batch, split.take_notes(), task_notes, differing)

    def _made(self, split: Split, key: BatchKey) -> Any:
        if self._begun != (key.split, key.epoch):
            self._begun, self._has_first = (key.split, key.epoch), False
            self.changes.tell()
            split.begin_epoch(key.epoch)
            self.changes.epoch_begins(key.split)
        if self._has_first:
            return split.batch(key.epoch, key.ids)
        batch = split.first_batch(key.epoch, key.ids)
        self._has_first = True
        return batch


class KeySampler:
    """An iterable over keys, which is all that a DataLoader asks of its sampler."""

    def __init__(self, keys: Iterator[BatchKey]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[BatchKey]:
        return self.keys


class QuietDataLoader(DataLoader[Any]):
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


def start_loader(
    reader: KeyedBatches, keys: Iterator[BatchKey], loader_cfg: Any, pin_memory: bool, stacks_path: str | None
) -> Iterator[Loaded]:
    """The batches of `keys`, in their order; LOADER.WORKERS processes, which start here, make them ahead.

    stacks_path: where these write their stacks when they are asked (keeper/heartbeat.py)
    """
    workers, task_class = loader_cfg.WORKERS, type(reader.task)
    module = task_class.__module__
    loader: DataLoader[Any] = QuietDataLoader(
        reader,
        batch_size=None,
        sampler=KeySampler(keys),
        collate_fn=unchanged,
        num_workers=workers,
        prefetch_factor=loader_cfg.PREFETCH if workers else None,
        pin_memory=pin_memory,
        multiprocessing_context=fork_server(module) if workers else None,
        worker_init_fn=functools.partial(
            init_loader_worker, stacks_path, default_start_method(), module, torch.get_default_dtype()
        ),
    )
    ForkingPickler.register(torch.Generator, reduce_generator)
    with contextlib.ExitStack() as stack:
        if workers:
            stack.enter_context(named_by_this_process())
        stack.enter_context(main_module_hidden())
        stack.enter_context(signals_held_back())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Got pickle error")  # the TaskError says it
        try:
            return iter(loader)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TaskError(
                f"{task_class.__name__} and its data sets go to {workers} loader workers by pickle, which "
                f"fails: {error}. Keep lambdas, open files, locks and classes made inside functions out of them, "
                "or load in the training process (--workers 0)"
            ) from error


def end_loader(batches: Any) -> None:
    """End the processes that make them, and the threads that fed these.

    torch leaves the threads to themselves. One that is still at it when the interpreter ends stops between a
    semaphore's end and the word of it, and multiprocessing warns of a leak.
    """
    shutdown = getattr(batches, "_shutdown_workers", None)
    if shutdown is None:  # they were made in this process, or none has been
        return
    shutdown()
    for queue in batches._index_queues:
        if queue._thread is not None:
            queue._thread.join(FEEDER_S)


def reduce_generator(generator: torch.Generator) -> Any:
    """How a generator is pickled for a process: by value.

    By torch's own way its state is a tensor, whose file is closed before the process that is to read it begins: a
    loader worker died of any data set that held one.
    """
    return rebuilt_generator, (str(generator.device), generator.get_state().numpy().tobytes())


def rebuilt_generator(device: str, state: bytes) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


def unchanged(batch: Any) -> Any:
    return batch


def fork_server(task_module: str) -> Any:
    """Has processes forked from a clean server process that has imported torch once: loader workers, and the user's.

    A plain fork would inherit the threads and locks of a Ray worker and can deadlock.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "raytrain.data.feed", "raytrain.data.fork_server", task_module])
    return context


@contextlib.contextmanager
def main_module_hidden() -> Iterator[None]:
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
def signals_held_back() -> Iterator[None]:
    """SIGINT and SIGTERM wait: for this thread until the block ends, for what the fork server forks until that can
    handle them, for the server itself for ever (it ends with the processes that use it)."""
    resource_tracker.ensure_running()  # when it starts its process, it lets these signals through again
    held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def default_start_method() -> str:
    """How processes start here where the user's code does not say."""
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


def init_loader_worker(
    stacks_path: str | None, start_method: str, task_module: str, default_dtype: torch.dtype, _: int
) -> None:
    """A loader worker lives as long as the training process: no longer, and through signals meant for all.

    Ctrl-C, and a SIGTERM to the whole process group, let the training process finish its step,
    for which it needs this worker. A second SIGTERM ends it.
    """
    end_with_parent()  # torch's own watch looks at the fork server, which never dies first
    handle_signals({signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: take_sigterm_once})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    multiprocessing.current_process().daemon = False  # as torch makes it, and then it could have no children
    multiprocessing.set_start_method(start_method, force=True)  # else it would be this process's own
    fork_server(task_module)  # of the user's, who may ask for one: it is not the one that this process is of
    tend_forks()
    at_exit(end_children)
    if stacks_path is not None:
        write_stacks_to(stacks_path)
    torch.set_num_threads(1)
    torch.set_default_dtype(default_dtype)  # which the task may have set, to build its model
    multiprocessing.queues.Queue._on_queue_feeder_error = send_error_instead  # type: ignore[attr-defined]


def take_sigterm_once(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_DFL)
    when_pools_are_broken(lambda: os._exit(1))


def send_error_instead(queue: Any, error: Exception, item: Any) -> None:
    """A batch that cannot be pickled would be lost without a word, and the loop would wait for it for ever."""
    message = f"a batch cannot leave its loader worker: {type(error).__name__}: {error}"
    advice = (
        "Batches go from loader workers to the training process by pickle: keep functions and open files out of them"
    )
    queue.put((item[0], Loaded(None, DataError(f"{message}\n\n{advice}"))))
