import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard_events import events_of

from raytrain.errors import StorageError, TaskError
from raytrain.journal.journal import Journal
from raytrain.journal.records import read_journal
from raytrain.journal.sinks import JsonlSink, LogSink, TensorBoardSink


@dataclasses.dataclass(frozen=True)
class Log:
    EVERY: int = 1
    LINE_EVERY: int = 2


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ListSink:
    """Keeps what arrives; `arrived` is set at each flush, `go` holds the writer back."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.arrived, self.go = threading.Event(), threading.Event()
        self.go.set()
        self.closed = False

    def write(self, record: dict[str, Any]) -> None:
        self.go.wait()
        self.records.append(record)

    def flush(self) -> None:
        self.arrived.set()

    def close(self) -> None:
        self.closed = True


def take(journal: Journal, number: int, **fields: Any) -> None:
    values = {
        "step": number,
        "epoch": (number - 1) // 4,
        "iteration": (number - 1) % 4,
        "loss": torch.tensor(1.0 / number),
        "grad_norm": torch.tensor(2.0),
        "lr": 0.01 * number,
        "momentum": 0.9,
        "terms": {"loss_box": torch.tensor(0.5)},
        "disp": {},
        "samples": 8,
        "data_s": 0.25,
        "step_s": 0.5,
    }
    journal.step(**{**values, **fields})


def begin(journal: Journal, step: int = 0, **fields: Any) -> None:
    journal.run(step=step, epoch=step // 4, steps_per_epoch=4, num_epochs=3, tag="toys/tiny(demo)", **fields)


def test_steps_are_wanted_at_the_interval_for_lines_and_at_both_ends_of_an_epoch() -> None:
    journal = Journal([], Log(EVERY=10, LINE_EVERY=4))
    wanted = [step for step in range(1, 23) if journal.wants(step, (step - 1) % 11, 11)]
    assert wanted == [1, 4, 8, 10, 11, 12, 16, 20, 22]


def test_a_step_record_has_the_promised_fields() -> None:
    sink, clock = ListSink(), Clock()
    journal = Journal([sink], Log(), clock)
    take(journal, 1, disp={"accuracy": torch.tensor(0.75), "note": "warm"})
    journal.flush()
    assert sink.records == [
        {
            "kind": "step",
            "time": 100.0,
            "step": 1,
            "epoch": 0,
            "iteration": 0,
            "loss": 1.0,
            "grad_norm": 2.0,
            "lr": 0.01,
            "momentum": 0.9,
            "samples": 8,
            "data_s": 0.25,
            "step_s": 0.5,
            "samples_per_s": 16.0,
            "terms": {"loss_box": 0.5},
            "disp": {"accuracy": 0.75, "note": "warm"},
        }
    ]
    journal.close()
    assert sink.closed


def test_tensors_that_the_next_step_overwrites_keep_their_value() -> None:
    sink = ListSink()
    journal = Journal([sink], Log())
    loss = torch.zeros(())
    for number in range(1, 4):
        loss.fill_(number)
        take(journal, number, loss=loss)
    journal.close()
    assert [record["loss"] for record in sink.records] == [1.0, 2.0, 3.0]


def test_all_kinds_of_numbers_are_taken_and_several_values_averaged() -> None:
    sink = ListSink()
    journal = Journal([sink], Log())
    terms = {
        "int": torch.tensor(3),
        "half": torch.tensor(0.5, dtype=torch.bfloat16),
        "double": torch.tensor([[0.1]], dtype=torch.float64),
        "several": torch.tensor([1, 2]),
        "number": 7,
    }
    take(journal, 1, terms=terms, loss=torch.tensor([2.0, 4.0]), grad_norm=None)
    journal.close()
    assert sink.records[0]["terms"] == {"int": 3, "half": 0.5, "double": 0.1, "several": 1.5, "number": 7}
    assert sink.records[0]["loss"] == 3.0
    assert sink.records[0]["grad_norm"] is None


def test_a_pending_loss_does_not_keep_its_graph() -> None:
    journal = Journal([ListSink()], Log(), Clock())
    weight = torch.ones(3, requires_grad=True)
    freed = threading.Event()

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            ctx.guard = type("Guard", (), {"__del__": lambda self: freed.set()})()
            return value.sum()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient.expand(3)

    take(journal, 1, loss=Watched.apply(weight))
    assert freed.is_set()
    journal.close()


def test_a_step_never_waits_for_a_sink() -> None:
    sink, clock = ListSink(), Clock()
    sink.go.clear()  # the disk hangs
    journal = Journal([sink], Log(), clock)
    for number in range(1, 2500):
        clock.now += 0.3
        take(journal, number)
    assert sink.records == []
    sink.go.set()
    journal.flush()
    assert [record["step"] for record in sink.records] == list(range(1, 2500))
    journal.close()


def test_records_arrive_by_themselves_after_a_second_or_a_thousand_steps() -> None:
    sink, clock = ListSink(), Clock()
    journal = Journal([sink], Log(), clock)
    take(journal, 1)
    clock.now += 0.9
    take(journal, 2)
    assert not sink.arrived.wait(0.05)
    clock.now += 0.1
    take(journal, 3)
    assert sink.arrived.wait(10)
    assert len(sink.records) == 3
    sink.arrived.clear()
    for number in range(4, 1004):
        take(journal, number)
    assert sink.arrived.wait(10)
    assert len(sink.records) == 1003
    journal.close()


def test_other_records_are_written_on_return_and_in_order() -> None:
    sink = ListSink()
    journal = Journal([sink], Log(), Clock())
    begin(journal)
    take(journal, 1)
    journal.write("eval", step=1, epoch=1, metrics={"accuracy": torch.tensor(0.5)})
    assert [record["kind"] for record in sink.records] == ["run", "step", "eval"]
    assert sink.records[0]["line_every"] == 2
    assert sink.records[2]["metrics"] == {"accuracy": 0.5}
    journal.close()


def test_a_journal_without_sinks_drops_records_and_starts_no_thread() -> None:
    before = threading.active_count()
    journal = Journal([], Log())
    begin(journal)
    take(journal, 1)
    assert threading.active_count() == before
    journal.close()


def test_closing_leaves_no_thread_behind_and_may_happen_twice() -> None:
    before = threading.active_count()
    journal = Journal([ListSink()], Log())
    take(journal, 1)
    journal.close()
    journal.close()
    assert threading.active_count() == before


def test_nan_is_written_as_null_and_named(tmp_path: Path) -> None:
    journal = Journal([JsonlSink(tmp_path / "journal.jsonl")], Log())
    take(journal, 1, loss=torch.tensor(math.nan), terms={"box": torch.tensor(math.inf)})
    journal.close()
    line = (tmp_path / "journal.jsonl").read_text()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    record = json.loads(line, parse_constant=refuse)
    assert (record["loss"], record["terms"], record["nonfinite"]) == (None, {"box": None}, ["loss", "terms.box"])


def test_a_term_that_is_no_number_is_named_at_the_next_call() -> None:
    journal = Journal([ListSink()], Log())
    take(journal, 1, terms={"boxes": object()})
    with pytest.raises(TaskError, match=r"terms\.boxes"):
        journal.flush()
    with pytest.raises(TaskError, match=r"terms\.boxes"):
        take(journal, 2)
    with pytest.raises(TaskError, match=r"terms\.boxes"):
        journal.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which this system lacks")
def test_a_full_disk_is_an_error_that_says_where_and_what_to_do() -> None:
    journal = Journal([JsonlSink("/dev/full")], Log())
    with pytest.raises(StorageError, match=r"/dev/full: the log cannot be written: No space left.*Free space"):
        begin(journal)
    with pytest.raises(StorageError, match="No space left"):
        journal.close()


def test_a_folder_that_cannot_be_made_is_an_error_that_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for sink in (JsonlSink, LogSink):
        with pytest.raises(StorageError, match="file"):
            sink(tmp_path / "file" / "journal.jsonl")
    with pytest.raises(StorageError, match="file"):
        TensorBoardSink(tmp_path / "file" / "tensorboard").write({"kind": "run", "time": 0.0, "step": 0, "epoch": 0})


def test_a_line_that_a_kill_tore_is_closed_so_that_later_ones_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    for launch in range(3):
        journal = Journal([JsonlSink(path)], Log())
        begin(journal, step=launch)
        take(journal, launch + 1)
        take(journal, launch + 2)
        journal.close()
        os.truncate(path, path.stat().st_size - 9)
    assert [(record["kind"], record["step"]) for record in read_journal(path)] == [
        ("run", 0),
        ("step", 1),
        ("run", 1),
        ("step", 2),
        ("run", 2),
        ("step", 3),
    ]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> points, as tensorboard reads them."""
    events = events_of(folder, "scalars")
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_heritages_tags_and_one_learning_rate_for_each_step(tmp_path: Path) -> None:
    journal = Journal([TensorBoardSink(tmp_path)], Log())
    begin(journal)
    for number in (1, 2, 3):
        take(journal, number, terms={"loss_box": 0.5, "loss": 99.0, "note": "text"})
    journal.write("eval", step=4, epoch=1, metrics={"Car_3d/easy_R40": 0.5, "broken": math.nan})
    journal.close()
    found = curves(tmp_path)
    assert found["meta_data/learning_rate"] == [
        (1, pytest.approx(0.01)),
        (2, pytest.approx(0.02)),
        (3, pytest.approx(0.03)),
    ]
    assert found["train/loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert {tag: points[0][1] for tag, points in found.items()} == pytest.approx(
        {
            "meta_data/learning_rate": 0.01,
            "train/loss": 1.0,
            "train/loss_box": 0.5,
            "train/grad_norm": 2.0,
            "train/momentum": 0.9,
            "perf/samples_per_s": 16.0,
            "perf/data_s": 0.25,
            "perf/step_s": 0.5,
        }
    )
    assert curves(tmp_path / "eval") == {"eval/Car_3d/easy_R40": [(1, 0.5)]}


KILLED = """
import os, signal, sys, types
from raytrain.journal.journal import Journal
from raytrain.journal.sinks import TensorBoardSink
journal = Journal([TensorBoardSink(sys.argv[1])], types.SimpleNamespace(EVERY=1, LINE_EVERY=50))
journal.run(step=0, epoch=0, steps_per_epoch=4, num_epochs=3)
for step in range(1, 10):
    journal.step(step=step, epoch=0, iteration=0, loss=100.0, grad_norm=1.0, lr=0.1, momentum=None, terms={}, disp={},
                 samples=1, data_s=0.0, step_s=1.0)
    if step % 4 == 0:
        journal.write("eval", step=step, epoch=step // 4, metrics={"accuracy": 0.1})
journal.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_curve_overlaps_after_a_killed_run_resumes(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -9
    (torn,) = tmp_path.glob("events*")
    os.truncate(torn, torn.stat().st_size - 5)
    for start in (6, 3):  # resumed twice, the second time from before the first
        journal = Journal([TensorBoardSink(tmp_path)], Log())
        begin(journal, step=start)
        for number in range(start + 1, 9):
            take(journal, number, loss=float(start))
            if number % 4 == 0:
                journal.write("eval", step=number, epoch=number // 4, metrics={"accuracy": float(start)})
        journal.close()
    assert curves(tmp_path)["train/loss"] == [(n, 100.0) for n in (1, 2, 3)] + [(n, 3.0) for n in range(4, 9)]
    assert curves(tmp_path / "eval")["eval/accuracy"] == [(1, 3.0), (2, 3.0)]


def test_an_evaluation_done_again_after_a_resume_is_drawn_once(tmp_path: Path) -> None:
    for value in (0.25, 0.5):
        journal = Journal([TensorBoardSink(tmp_path)], Log())
        begin(journal, step=4)
        journal.write("eval", step=4, epoch=1, metrics={"accuracy": value})
        journal.close()
    assert curves(tmp_path / "eval")["eval/accuracy"] == [(1, 0.5)]


def test_tensorboard_writes_start_no_thread_and_no_process(tmp_path: Path) -> None:
    before = threading.active_count()
    sink = TensorBoardSink(tmp_path)
    sink.write({"kind": "run", "time": 1.0, "step": 0, "epoch": 0})
    assert threading.active_count() == before
    sink.close()


def test_the_log_has_the_heritages_lines_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, clock = tmp_path / "train_20261123-053305.log", Clock()
    log = LogSink(path, console=True, clock=clock)
    journal = Journal([log], Log(), clock)
    log.text("Net(\n  (a): Linear()\n)")
    begin(journal, step=4, resumed_from="ckpt/checkpoint_epoch_1")
    for number in (5, 6, 7, 8):
        take(journal, number, epoch=1)
    journal.write("checkpoint", step=8, epoch=2, name="checkpoint_epoch_2")
    journal.write("eval", step=8, epoch=2, metrics={"accuracy": 0.5})
    journal.write("event", event="restart", message="worker 1 died")
    journal.write("end", status="finished", step=12, epoch=3)
    journal.close()
    said = path.read_text()
    assert capsys.readouterr().out == said
    assert said.splitlines()[0].endswith(",000   INFO  Net(")
    starts = [line.split("INFO  ")[-1].split("WARNING  ")[-1][:38].rstrip() for line in said.splitlines()]
    assert starts == [
        "Net(",
        "  (a): Linear()",
        ")",
        "==> Resumed from ckpt/checkpoint_epoch",
        "**********************Start training t",
        "Train:    2/3 ( 67%) [   0/4 (  0%)]",
        "Train:    2/3 ( 67%) [   1/4 ( 25%)]",
        "Train:    2/3 ( 67%) [   3/4 ( 75%)]",
        "Saved checkpoint_epoch_2 (epoch 2, ste",
        "**********************Start evaluation",
        "*************** EPOCH 2 EVALUATION ***",
        "*************** Performance of EPOCH 2",
        "accuracy: 0.500000",
        "****************Evaluation done.******",
        "Epoch 2 has been evaluated",
        "**********************End evaluation t",
        "restart: worker 1 died",
        "**********************End training toy",
    ]


def test_a_run_that_did_not_finish_is_logged_with_its_reason(tmp_path: Path) -> None:
    log = LogSink(tmp_path / "train.log")
    log.write({"kind": "end", "time": 0.0, "status": "stopped", "step": 7, "epoch": 1, "message": "SIGTERM"})
    log.close()
    assert (tmp_path / "train.log").read_text().endswith("INFO  Training stopped at step 7: SIGTERM\n")


def test_importing_the_journal_loads_neither_torch_nor_tensorboard() -> None:
    heavy = ("torch", "tensorboardX", "rich", "ray")
    probe = f"import sys, raytrain.journal.journal; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which this machine lacks")
def test_a_step_on_a_gpu_never_waits_for_the_device() -> None:
    sink, clock = ListSink(), Clock()
    journal = Journal([sink], Log(), clock)
    loss = torch.zeros((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(1, 50):
            clock.now += 0.4
            loss.fill_(number)
            take(journal, number, loss=loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    journal.close()
    assert [record["loss"] for record in sink.records] == [float(n) for n in range(1, 50)]
