"""What ended a launch, and what workers that were started again, is in the journal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import s3_server
from small_runs import config, journal, train

from raytrain.config.sections import Config
from raytrain.errors import PreflightError, RaytrainError
from raytrain.journal.journal import Journal
from raytrain.journal.records import read_journal
from raytrain.journal.sinks import JsonlSink
from raytrain.storage.lock import locked
from raytrain.storage.storage import open_storage
from raytrain.training import run_journal
from raytrain.training.control import Restart
from raytrain.training.run_journal import is_resize, restart_message, write_failure, write_resize

STEP = b'{"kind": "step", "step": 1}\n'


@pytest.mark.parametrize(
    ("why", "step", "message"),
    [
        ("rank 1 died without a word in step 9", 8, "rank 1 died without a word in step 9; {} go on after step 8"),
        ("rank 0 failed in step 3; rank 1 died", 2, "rank 0 failed in step 3; rank 1 died; {} go on after step 2"),
        ("rank 0 hung in step 1", 0, "rank 0 hung in step 1; {} begin anew"),
        ("", 8, "{} go on after step 8"),
        ("", 0, "{} begin anew"),
        ("a worker process failed", 1, "a worker process failed; {} go on after step 1"),
    ],
)
def test_a_restart_says_why_and_where_it_goes_on(why: str, step: int, message: str) -> None:
    assert restart_message(why, step) == message.format("the workers were started again and")


def test_a_change_of_the_number_of_workers_is_told_with_its_cost(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "journal.jsonl")
    restart = Restart("there is room for more", num_workers=2, stopped_at=100.0, is_planned=True)
    write_resize(Journal([sink], Config.model_fields["LOG"].default), restart, num_workers=4, now=101.25)
    sink.close()
    record = json.loads((tmp_path / "journal.jsonl").read_text())
    assert {key: record[key] for key in ("event", "from", "to", "why", "planned", "seconds")} == {
        "event": "resize",
        "from": 2,
        "to": 4,
        "why": "there is room for more",
        "planned": True,
        "seconds": 1.25,
    }
    assert record["message"] == (
        "2 -> 4 workers: there is room for more; 1.2 s from the last step of those to the first of these"
    )


@pytest.mark.parametrize(("before", "stopped_at", "is_one"), [(2, 1.0, True), (4, 1.0, False), (None, 1.0, False)])
def test_a_restart_is_a_change_of_size_where_there_were_other_workers(
    before: int | None, stopped_at: float, is_one: bool
) -> None:
    assert is_resize(Restart("", before, stopped_at), 4) == is_one
    assert not is_resize(Restart("", before, None), 4), "none of those before has ended a step"


@pytest.mark.parametrize("before", [STEP, STEP * 2, STEP + b'{"kind": "st', b'{"ki'])
def test_a_failure_is_the_last_line_also_after_a_torn_one(before: bytes, tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    file.write_bytes(before)
    write_failure(str(tmp_path), "Training failed\n\n  at once")
    assert file.read_bytes().startswith(before)
    last = json.loads(file.read_text().splitlines()[-1])
    assert (last["kind"], last["event"], last["message"]) == ("event", "failure", "Training failed\n\n  at once")


def test_a_failure_behind_a_uri_is_told_there() -> None:
    with s3_server.serving() as server:
        storage = open_storage(server.uri("bucket/run"))
        storage.write_bytes("journal.jsonl", STEP)
        write_failure(server.uri("bucket/run"), "gone")
        assert [record["kind"] for record in read_journal(storage)] == ["step", "event"]


def test_a_run_that_never_began_has_no_journal_and_another_runs_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_failure(str(tmp_path), "too early")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "journal.jsonl").write_bytes(STEP)
    monkeypatch.setattr(run_journal, "LOCK_S", 0.0)
    with locked(open_storage(str(tmp_path))), pytest.raises(PreflightError):
        write_failure(str(tmp_path), "of another launch")
    assert (tmp_path / "journal.jsonl").read_bytes() == STEP


@pytest.mark.ray
@pytest.mark.parametrize(
    ("task", "model"),
    [
        ("ExitsTask", {}),
        ("FailsOnRank1", {}),  # for want of ranks
        ("DiesOnRank1", {}),  # likewise
        ("PoisonedTask", {"STEP": 4}),  # before, what forward writes into weights is undone with the bad step
        ("ScriptedTask", {"SCORES": [0.5]}),  # the second epoch has none
    ],
)
def test_a_launch_that_fails_is_told_with_the_screen_that_was_shown(
    task: str, model: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RaytrainError) as raised:
        train(config(tmp_path, task, {}, MODEL=model))
    *_, failure = journal(tmp_path / "run" / "default", "event")
    assert (failure["event"], failure["message"]) == ("failure", str(raised.value))
