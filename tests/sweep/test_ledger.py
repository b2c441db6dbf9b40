"""The ledger: nothing that was appended is lost, and a sweep is read from it as it went."""

from __future__ import annotations

import contextlib
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3_server
from ledger_records import SWEEP, result, trial

from raytrain.journal.run_folder import RunFolder
from raytrain.storage.storage import open_storage
from raytrain.sweep.ledger import LEDGER, Ledger, read_ledger
from raytrain.sweep.view import view_of


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
