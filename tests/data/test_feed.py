"""The stream of batches: a sample has the same bits whoever loads it; one set of loader workers, which ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import environment
from feeds import feed_of, whole_run
from tasks_for_units import Draws, DrawTask
from torch.utils.data import IterableDataset

from raytrain.data.loader import BatchKey, check_loader_workers
from raytrain.engine.world import World
from raytrain.errors import DataError, LostLoaderError, PreflightError, TaskError
from raytrain.progress import Plan, Progress
from raytrain.training.contract import check_dataset


def draws_of(batches: Any) -> dict[tuple[str, int, int], list[float]]:
    """(split, epoch, sample id) -> what was drawn for it; the same sample always draws the same."""
    found: dict[tuple[str, int, int], list[float]] = {}
    for key, batch in batches:
        assert batch["id"].tolist() == list(key.ids)
        for sample_id, draws in zip(key.ids, batch["draws"].tolist(), strict=True):
            assert found.setdefault((key.split, key.epoch, sample_id), draws) == draws
    return found


@pytest.fixture(scope="module")
def in_process() -> list[tuple[BatchKey, dict[str, Any]]]:
    """The whole run, loaded by this process."""
    with feed_of() as feed:
        return list(whole_run(feed))


def test_every_sample_of_every_epoch_is_drawn_anew(in_process: list[Any]) -> None:
    found = draws_of(in_process)
    assert set(found) == {("train", e, i) for e in range(3) for i in range(22)} | {
        ("val", e, i) for e in (2, 3) for i in range(7)
    }
    assert len({tuple(draws) for draws in found.values()}) == len(found)


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_workers_change_no_bit_of_a_sample_or_batch(workers: int, in_process: list[Any]) -> None:
    with feed_of(workers) as feed:
        batches = list(whole_run(feed))
    assert [key for key, _ in batches] == [key for key, _ in in_process]
    assert draws_of(batches) == draws_of(in_process)
    assert [b["collated"] for _, b in batches] == [b["collated"] for _, b in in_process]


def test_the_number_of_processes_changes_no_bit_of_a_sample(in_process: list[Any]) -> None:
    parts = []
    for rank in range(2):
        with feed_of(world=World(rank, 2, 2)) as feed:
            parts += list(whole_run(feed))
    assert draws_of(parts) == draws_of(in_process)
    assert {k for k, _ in parts} == {k for k, _ in in_process}


def test_a_restart_changes_no_bit_of_what_is_left(in_process: list[Any]) -> None:
    torch.rand(123), np.random.rand(7)  # whatever went before
    with feed_of(1) as feed:
        rest = list(whole_run(feed, Progress(1, 12, 6)))
    assert len(rest) == 2 * 2 + 3 + 4 * 2 + 3
    for (key, batch), (key_before, before) in zip(rest, in_process[-len(rest) :], strict=True):
        assert key == key_before
        assert torch.equal(batch["draws"], before["draws"])


def test_one_set_of_loader_workers_serves_the_whole_run_evaluation_included() -> None:
    with feed_of(2) as feed:
        batches = list(whole_run(feed))
    processes = {batch["process"] for _, batch in batches}
    assert len(processes) == 2 and os.getpid() not in processes
    for split in ("train", "val"):
        assert {batch["process"] for key, batch in batches if key.split == split} == processes


def test_set_epoch_reaches_the_process_that_loads_before_the_first_sample_of_an_epoch() -> None:
    for workers in (0, 2):
        with feed_of(workers) as feed:
            for key, batch in whole_run(feed):
                assert batch["epoch"] == [key.epoch] * len(key.ids)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_sample_names_the_sample_and_the_users_line(workers: int) -> None:
    with feed_of(workers, datasets={"train": Draws(22, fails_at=13), "val": Draws(7)}) as feed:
        with pytest.raises(DataError) as raised:
            list(whole_run(feed))
        assert feed.current is not None and 13 in feed.current.ids
    text = str(raised.value)
    assert text.startswith("sample 13 of data set 'train': ValueError: this scan has no points\n")
    assert 'tasks_for_units.py", line' in text and "in __getitem__" in text


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_batch_names_its_samples(workers: int) -> None:
    plan = Plan(num_samples=1001, batch_size=1001, virtual_workers=1, accumulate=1, num_epochs=1)
    with feed_of(workers, datasets={"train": Draws(1001), "val": Draws(1)}, plan=plan) as feed:
        with pytest.raises(DataError, match=r"collate of 1001 samples of data set 'train': KeyError: 'gt_boxes'"):
            list(whole_run(feed))
        assert feed.current is not None and 1000 in feed.current.ids


def test_an_error_does_not_come_before_its_turn() -> None:
    """The loader reads ahead; what it fails at later must not spoil the steps before."""
    with feed_of(1, datasets={"train": Draws(22), "val": Draws(7, fails_at=6)}) as feed:
        seen = []
        with pytest.raises(DataError, match="sample 6 of data set 'val': ValueError"):
            seen += [key for key, _ in whole_run(feed) if not seen.append(key)]
    assert len(seen) == 2 * 4 * 2 + 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_task_that_promises_not_to_draw_is_held_to_it(workers: int) -> None:
    with feed_of(workers) as feed:
        feed.task.random_samples = False
        with pytest.raises(DataError, match=r"of data set 'train' drew random .*: set DrawTask.random_samples to True"):
            next(whole_run(feed))


def test_a_task_that_does_not_draw_need_not_be_seeded_for_each_sample() -> None:
    with feed_of(datasets={"train": list(range(22)), "val": list(range(7))}) as feed:  # type: ignore[dict-item]
        feed.task.random_samples = False
        feed.task.collate = torch.tensor  # type: ignore[method-assign, assignment]
        assert sorted(i for key, batch in whole_run(feed) if key.epoch == 1 for i in batch.tolist()) == list(range(22))


def test_close_leaves_no_loader_worker() -> None:
    with feed_of(2) as feed:
        stream = whole_run(feed)
        processes = {next(stream)[1]["process"] for _ in range(4)}
        assert all(Path(f"/proc/{process}").exists() for process in processes)
        stream.close()
    deadline = time.monotonic() + 10
    while any(is_alive(process) for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    feed.close()  # once more does no harm


def test_no_thread_of_a_feed_outlives_it_to_end_with_the_interpreter_with_a_semaphore_half_removed() -> None:
    before = set(threading.enumerate())
    with feed_of(2) as feed:
        next(whole_run(feed))
        assert set(threading.enumerate()) - before  # those that tell the workers what to load
    assert not set(threading.enumerate()) - before


def test_a_loader_worker_that_dies_is_told_as_that_also_where_batches_of_it_are_in_the_queue() -> None:
    with feed_of(1) as feed:
        stream = whole_run(feed)
        process = next(stream)[1]["process"]
        batches: Any = feed._batches
        while batches._worker_result_queue.empty():
            time.sleep(0.01)
        os.kill(process, signal.SIGKILL)
        while is_alive(process):
            time.sleep(0.01)
        with pytest.raises(LostLoaderError, match=r"^a loader worker died: "):
            list(stream)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_feed_that_never_started_closes() -> None:
    with feed_of(2):
        pass


def test_it_works_in_a_thread_as_a_ray_worker_trains_in_one(in_process: list[Any]) -> None:
    found: list[Any] = []

    def load() -> None:
        with feed_of(2) as feed:
            found.append(draws_of(whole_run(feed)))

    thread = threading.Thread(target=load)
    thread.start()
    thread.join(60)
    assert found == [draws_of(in_process)]


@pytest.mark.ray  # starts two processes that import torch
def test_loader_workers_do_not_run_the_users_script_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "print('once')\n"  # at top level, and no guard below: a plain spawn would run all of it in each worker
        "from feeds import feed_of, whole_run\n"
        "with feed_of(1) as feed:\n"
        "    print(len(list(whole_run(feed))))\n"
    )
    done = subprocess.run([sys.executable, script], env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("once\n30\n", "", 0)


def test_this_process_keeps_its_main_module() -> None:
    main = sys.modules["__main__"]
    before = (getattr(main, "__file__", None), main.__spec__)
    with feed_of(1) as feed:
        feed.start(Progress())
        assert (getattr(main, "__file__", None), main.__spec__) == before


def test_numpy_in_a_batch_arrives_as_tensors(in_process: list[Any]) -> None:
    _, batch = in_process[0]
    assert batch["draws"].dtype == torch.float64 and batch["id"].dtype == torch.int64
    assert isinstance(batch["process"], int)


def test_the_steps_of_an_epoch_hold_every_sample_once_and_count_them() -> None:
    plan = Plan(num_samples=22, batch_size=2, virtual_workers=3, accumulate=2, num_epochs=1)
    with feed_of(plan=plan) as feed:
        steps = list(feed.epoch_steps(Progress()))
    assert [len(step.micro_batches[0]) for step in steps] == [2, 2]
    assert [step.consumed for step in steps] == [12, 12]  # 22 and two repeated: 3 virtual workers take 8 each
    ids = [i for step in steps for keys in step.micro_batches.values() for key in keys for i in key.ids]
    assert set(ids) == set(range(22)) and len(ids) == 24


def test_evaluation_batches_do_not_depend_on_the_number_of_processes() -> None:
    plan = Plan(num_samples=22, batch_size=3, virtual_workers=4, accumulate=1, num_epochs=1)
    for size in (1, 2, 3, 4):
        dealt = []
        for rank in range(size):
            with feed_of(world=World(rank, size, 4), plan=plan) as feed:
                dealt += [key.ids for key in feed.validation_keys(Progress(1))]
        assert sorted(dealt) == [(0, 1, 2), (3, 4, 5), (6,)]


def test_the_wait_for_data_is_told_once() -> None:
    with feed_of() as feed:
        next(whole_run(feed))
        assert feed.take_wait_s() > 0
        assert feed.take_wait_s() == 0


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Lengthless:
    def __getitem__(self, i: int) -> int:
        return i


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (Stream(), "gave Stream.*iterable data sets cannot be resumed"),
        ((i for i in range(3)), "gave generator.*map-style"),
        (Lengthless(), r"gave Lengthless, whose len\(\) fails: TypeError"),
        (range(10**9), "gave a data set of 1,000,000,000 samples; the order of an epoch is kept in memory"),
        ([], "gave an empty data set; there is nothing to train on"),
        (None, "gave None; only the validation split may be left out"),
    ],
)
def test_what_is_no_map_style_data_set_is_refused(dataset: Any, said: str) -> None:
    with pytest.raises(TaskError, match=rf"DrawTask.build_dataset\('train'\) {said}"):
        check_dataset(dataset, "train", DrawTask(None))  # type: ignore[arg-type]


def test_batches_that_are_far_away_take_no_memory() -> None:
    many = 2_000_000
    plan = Plan(num_samples=many, batch_size=1, virtual_workers=1, accumulate=1, num_epochs=1)
    with feed_of(datasets={"train": range(many), "val": range(many)}, plan=plan) as feed:
        tracemalloc.start()
        try:
            next(feed.epoch_steps(Progress()))
            next(feed.validation_keys(Progress()))
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()


def test_loader_workers_that_would_fill_the_memory_are_refused() -> None:
    check_loader_workers(32, num_cpus=2)
    with pytest.raises(PreflightError, match=r"LOADER.WORKERS is 200, .* on 2 CPUs .* Give 32 at most; 2 is a good"):
        check_loader_workers(200, num_cpus=2)


def test_more_loader_workers_than_cpus_are_no_reason_for_torch_to_print(capfd: pytest.CaptureFixture[str]) -> None:
    with feed_of(workers=len(os.sched_getaffinity(0)) + 1) as feed:
        feed.start(Progress(2))  # its warning would be an error here
    assert capfd.readouterr() == ("", "")
