"""The ledger: nothing that was appended is lost, and a sweep is read from it as it went."""

from __future__ import annotations

import contextlib
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3_server

from raytrain.journal.run_folder import RunFolder
from raytrain.storage.storage import open_storage
from raytrain.sweep.ledger import LEDGER, Ledger, read_ledger
from raytrain.sweep.view import SweepView, view_of

SWEEP = {
    "kind": "sweep",
    "time": 100.0,
    "scheduler": "asha",
    "search": "random",
    "metric": "accuracy",
    "mode": "max",
    "num_samples": 4,
    "seed": 0,
    "num_epochs": 9,
    "space": {"OPTIMIZATION.LR": {"loguniform": [1e-4, 1e-1]}},
    "concurrent": 2,
}


def trial(number: int, lr: float = 0.01) -> dict[str, Any]:
    return {"kind": "trial", "time": 101.0, "trial": number, "params": {"OPTIMIZATION.LR": lr}}


def of(kind: str, number: int, epoch: int, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "time": 102.0 + epoch, "trial": number, "epoch": epoch, **fields}


def result(number: int, epoch: int, value: float | None, **fields: Any) -> dict[str, Any]:
    fields = {"step": 10 * epoch, "metrics": {"accuracy": value}, "seconds": 1.5 * epoch, **fields}
    return of("result", number, epoch, value=value, **fields)


def view(*records: dict[str, Any]) -> SweepView:
    return view_of([SWEEP, *records])


@pytest.fixture(params=["disk", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "sweep")
        return
    with s3_server.serving() as server:
        yield server.uri("bucket/sweep")


@contextlib.contextmanager
def opened(uri: str) -> Iterator[Ledger]:
    with contextlib.closing(RunFolder(uri, LEDGER)) as folder, contextlib.closing(Ledger(folder)) as ledger:
        yield ledger


def test_a_second_launch_appends_on_a_disk_and_behind_a_uri(uri: str) -> None:
    assert read_ledger(open_storage(uri)) == []
    for number in range(2):
        with opened(uri) as ledger:
            ledger.append(SWEEP)
            ledger.append(trial(number))
            assert read_ledger(open_storage(uri))[-1] == trial(number)  # what was decided is there at once
            ledger.append(result(number, 1, 0.5))
    records = read_ledger(open_storage(uri))
    assert [record["kind"] for record in records] == ["sweep", "trial", "result"] * 2
    assert records[-1] == result(1, 1, 0.5)


def test_results_behind_a_uri_wait_a_few_seconds_for_the_next(tmp_path: Path) -> None:
    with s3_server.serving() as server, opened(server.uri("bucket/sweep")) as ledger:
        storage = open_storage(server.uri("bucket/sweep"))
        ledger.append(SWEEP)
        ledger.append(trial(0))
        for epoch, there in ((1, 2), (2, 2), (4, 5)):  # at 103, 104 and 106 s; the last copy was at 100, then 106
            ledger.append(result(0, epoch, 0.5))
            assert len(read_ledger(storage)) == there


def test_a_record_is_in_the_file_when_append_returns_and_its_writer_is_killed(tmp_path: Path) -> None:
    writer = (
        "import os, signal, sys\nfrom raytrain.sweep.ledger import *\n"
        "from raytrain.journal.run_folder import RunFolder\n"
        "ledger = Ledger(RunFolder(sys.argv[1], LEDGER))\n"
        "ledger.append({'kind': 'trial', 'time': 1.0, 'trial': 0, 'params': {}})\n"
        "for epoch in range(5): ledger.append({'kind': 'start', 'time': 1.0, 'trial': 0, 'epoch': epoch})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", writer, str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [record["epoch"] for record in read_ledger(open_storage(str(tmp_path)))[1:]] == [0, 1, 2, 3, 4]


def test_a_torn_line_costs_that_line_alone(tmp_path: Path) -> None:
    with opened(str(tmp_path)) as ledger:
        ledger.append(SWEEP)
    with (tmp_path / LEDGER).open("a") as file:
        file.write('{"kind":"trial","time":1')
    assert read_ledger(open_storage(str(tmp_path))) == [SWEEP]
    with opened(str(tmp_path)) as ledger:
        ledger.append(trial(0))
    assert read_ledger(open_storage(str(tmp_path))) == [SWEEP, trial(0)]


def test_a_value_that_is_not_finite_is_written_as_none_and_is_never_the_best(tmp_path: Path) -> None:
    with opened(str(tmp_path)) as ledger:
        for record in (SWEEP, trial(0), result(0, 1, 0.5), result(0, 2, math.nan)):
            ledger.append(record)
    seen = view_of(read_ledger(open_storage(str(tmp_path)))).trials[0]
    assert (seen.value, seen.best, seen.best_epoch) == (None, 0.5, 1)
    assert seen.curve == [(1, 10, 0.5), (2, 20, None)]


def test_a_trial_has_the_state_of_its_newest_record() -> None:
    seen = view(
        *map(trial, range(5)),
        of("start", 1, 0),
        result(2, 3, 0.5),
        of("stopped", 2, 3, why="asha"),
        of("done", 3, 9),
        of("failed", 4, 2, error="out of memory", logs="trial_0004/logs"),
    )
    assert [t.state for t in seen.trials.values()] == ["waiting", "running", "stopped", "done", "failed"]
    assert seen.counts() == {"running": 1, "done": 1, "stopped": 1, "failed": 1, "waiting": 1}
    assert seen.trials[2].why == "asha"
    assert (seen.trials[4].error, seen.trials[4].logs) == ("out of memory", "trial_0004/logs")
    assert seen.num_samples == 5
    seen.add(of("start", 4, 2))
    assert (seen.trials[4].state, seen.trials[4].error) == ("running", None)
    seen.add({**SWEEP, "time": 200.0})  # the launch was killed, and its trials with it
    assert seen.trials[1].state == seen.trials[4].state == "waiting"


def test_what_a_killed_trial_measures_again_counts_once_and_its_work_twice() -> None:
    seen = view(trial(0), of("start", 0, 0), *(result(0, e, v) for e, v in ((1, 0.5), (2, 0.9), (3, 0.7))))
    assert (seen.trials[0].best, seen.trials[0].best_epoch) == (0.9, 2)
    seen.add(of("start", 0, 1))
    assert seen.trials[0].curve == [(1, 10, 0.5)]
    assert (seen.trials[0].epoch, seen.trials[0].best) == (1, 0.5)
    seen.add(result(0, 2, 0.6))
    assert seen.trials[0].curve == [(1, 10, 0.5), (2, 20, 0.6)]
    assert seen.trials[0].trained == 4


def test_a_clone_keeps_its_own_curve_but_its_best_is_of_the_weights_it_has_now() -> None:
    seen = view(trial(0), *(result(0, e, v) for e, v in ((1, 0.8), (2, 0.3), (3, 0.2))))
    phases = [{"FROM_EPOCH": 2, "LR": 0.02}]
    seen.add(of("clone", 0, 2, **{"from": 1, "params": {"OPTIMIZATION.LR": 0.02}, "config_phases": phases}))
    clone = seen.trials[0]
    assert clone.curve == [(1, 10, 0.8), (2, 20, 0.3)]
    assert (clone.epoch, clone.best, clone.params["OPTIMIZATION.LR"]) == (2, None, 0.02)
    seen.add(result(0, 3, 0.7))
    assert (clone.best, clone.best_epoch, clone.clones, clone.phases) == (0.7, 3, [(2, 1)], phases)
    assert [(epoch, params["OPTIMIZATION.LR"]) for epoch, params in clone.history] == [(0, 0.01), (2, 0.02)]
    assert clone.trained == 4


def test_a_sweep_of_many_epochs_is_read_in_time_that_grows_with_them() -> None:
    def read_s(epochs: int) -> float:
        records = [SWEEP, trial(0), *(result(0, epoch, 1 / epoch) for epoch in range(1, epochs + 1))]
        began = time.process_time()
        assert view_of(records).trials[0].best_epoch == 1
        return time.process_time() - began

    assert min(read_s(20_000) for _ in range(3)) < 40 * min(read_s(1_000) for _ in range(3)), "400 where it is squared"


def test_the_best_is_by_the_mode_and_of_equals_the_first() -> None:
    records = [trial(0), trial(1), trial(2), trial(3), result(2, 1, 0.5), result(1, 1, 0.5), result(0, 1, 0.3)]
    assert [t.number for t in view(*records).ranked()] == [1, 2, 0, 3]
    least = view_of([{**SWEEP, "mode": "min"}, *records])
    assert [t.number for t in least.ranked()] == [0, 1, 2, 3]
    assert view(trial(0)).best is None


def test_the_time_of_a_sweep_is_the_sum_of_its_launches() -> None:
    seen = view(trial(0), result(0, 8, 0.5))  # killed at 110
    assert seen.elapsed_s() == 10.0
    assert seen.elapsed_s(now=130.0) == 30.0
    seen.add({**SWEEP, "time": 1000.0})
    seen.add({"kind": "end", "time": 1005.0, "status": "finished", "best": 0, "value": 0.5, "seconds": 5.0})
    assert seen.elapsed_s(now=2000.0) == 15.0
