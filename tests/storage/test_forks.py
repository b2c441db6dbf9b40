"""What is forked from a process of a run answers signals as if there were no run, and ends with it."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import joblib
import pytest
import torch
from commands import alive, wait_for

from raytrain.data.loader import take_sigterm_once
from raytrain.storage.forks import end_children, handle_signals, tend_forks

FORK = multiprocessing.get_context("fork")


def take_note(number: int, frame: Any) -> None:
    """As a training process does of a wish to stop."""


@pytest.fixture(params=[take_note, take_sigterm_once, signal.SIG_IGN], ids=["note", "once", "ignored"])
def handled(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A handler that this process has for the time of the test."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handle_signals(dict.fromkeys(kept, request.param))
    tend_forks()
    try:
        yield request.param
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def forked(function: Callable[[], Any]) -> int:
    """The pid of a plain fork that calls it."""
    if (pid := os.fork()) == 0:
        function()
        os._exit(0)
    return pid


def test_a_sigterm_ends_a_fork_however_soon_it_comes(handled: Any) -> None:
    for delay_s in (0.0, 0.0, 0.0, 0.001, 0.01):
        pid = forked(lambda: time.sleep(60))
        time.sleep(delay_s)
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is handled
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}


def test_ctrl_c_is_left_to_the_process_that_has_forked(handled: Any) -> None:
    pid = forked(lambda: time.sleep(0.05))
    os.kill(pid, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_what_a_fork_starts_can_be_ended_by_either_signal(handled: Any) -> None:
    def start() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            program = subprocess.Popen(["sleep", "60"])
            program.send_signal(number)
            assert program.wait() == -number

    assert os.waitstatus_to_exitcode(os.waitpid(forked(start), 0)[1]) == 0


def test_a_handler_of_the_users_own_is_inherited_as_ever(handled: Any) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    pid = forked(lambda: time.sleep(60))
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_two_threads_fork_at_once_and_both_get_their_signals_back(handled: Any) -> None:
    masks: list[Any] = []

    def fork_often() -> None:
        for _ in range(5):
            os.waitpid(forked(lambda: None), 0)
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    threads = [threading.Thread(target=fork_often) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [mask & {signal.SIGINT, signal.SIGTERM} for mask in masks] == [set(), set()]


def busy(pipe: Any) -> None:
    pipe.send(os.getpid())
    time.sleep(60)


def with_a_child(pipe: Any) -> None:
    FORK.Process(target=busy, args=(pipe,)).start()
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_pools_worker_at_work_ends_with_the_process_that_started_it(handled: Any, number: int) -> None:
    here, there = FORK.Pipe()
    parent = FORK.Process(target=with_a_child, args=(there,))
    parent.start()
    assert here.poll(20)
    child = here.recv()
    os.kill(parent.pid or 0, number)
    parent.join()
    wait_for(lambda: not alive(child), "the end of the child", deadline_s=10)


def sum_of_many() -> float:
    return float(torch.ones(1 << 20).sum())


def test_torch_computes_in_a_pool_though_it_had_threads_where_that_was_forked(handled: Any) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sum_of_many()
        with FORK.Pool(1) as pool:
            assert pool.apply_async(sum_of_many).get(20) == 1 << 20
    finally:
        torch.set_num_threads(threads)


def leave_an_executor() -> None:
    executor = concurrent.futures.ProcessPoolExecutor(1, mp_context=FORK)
    executor.submit(os.getpid).result(20)
    end_children()


def leave_loky() -> None:
    """joblib keeps its processes for five minutes, for whoever comes next."""
    assert joblib.Parallel(n_jobs=2, backend="loky")(joblib.delayed(abs)(-i) for i in range(2)) == [0, 1]
    end_children()


@pytest.mark.parametrize("leave", [leave_an_executor, leave_loky])
def test_an_executor_that_nobody_shuts_down_does_not_hold_up_the_end(handled: Any, leave: Callable[[], None]) -> None:
    process = FORK.Process(target=leave)  # which has no other children, as this one may
    process.start()
    process.join(20)
    assert process.exitcode == 0
