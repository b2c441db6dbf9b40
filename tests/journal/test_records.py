import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from raytrain.errors import StorageError, TaskError
from raytrain.journal import heritage_log, records
from raytrain.storage.local import LocalStorage

GOLDEN = Path(__file__).parents[1] / "golden" / "log_lines.txt"


def lines_of(*journal: dict) -> list[str]:
    return [json.dumps(record) for record in journal]


def counting(folder: Path, lines: list[str], *kinds: str) -> list[dict]:
    """The records that a reader of a journal of these lines gets."""
    (folder / "journal.jsonl").write_text("\n".join(lines))
    return records.read_journal(LocalStorage(folder), kinds=kinds)


def step(number: int, **fields: object) -> dict:
    return {"kind": "step", "time": float(number), "step": number, **fields}


def run(number: int, **fields: object) -> dict:
    return {"kind": "run", "time": float(number), "step": number, "epoch": 0, **fields}


def test_a_resume_drops_the_records_it_overwrites_and_keeps_events(tmp_path: Path) -> None:
    journal = lines_of(
        run(0),
        step(1),
        step(2),
        {"kind": "checkpoint", "time": 2, "step": 2},
        {"kind": "eval", "time": 3, "step": 3, "metrics": {}},
        {"kind": "event", "time": 3, "event": "nonfinite", "step": 3, "message": "step 3: the loss is nan"},
        {"kind": "event", "time": 3, "event": "failure", "message": "gone"},
        run(2),
        step(3, loss=7.0),
    )
    path = tmp_path / "journal.jsonl"
    path.write_text("\n".join(journal) + "\n")
    kinds = [(record["kind"], record.get("step")) for record in records.read_journal(path)]
    assert kinds == [("run", 0), ("step", 1), ("step", 2), ("checkpoint", 2), ("event", None), ("run", 2), ("step", 3)]
    assert counting(tmp_path, journal) == records.read_journal(path)


def test_a_torn_line_is_legal_at_the_end_and_where_a_resume_closed_it(tmp_path: Path) -> None:
    whole = lines_of(run(0), step(1), run(1), step(2))
    journal = [*whole[:2], whole[1][:17], *whole[2:], whole[3][:-1]]
    assert [record["step"] for record in counting(tmp_path, journal)] == [0, 1, 1, 2]


def test_an_evaluation_done_again_at_the_same_step_counts_once(tmp_path: Path) -> None:
    journal = lines_of(run(0), {"kind": "eval", "step": 4, "n": 1}, run(4), {"kind": "eval", "step": 4, "n": 2})
    assert [record["n"] for record in counting(tmp_path, journal) if record["kind"] == "eval"] == [2]


def test_pictures_drawn_again_after_a_resume_count_once(tmp_path: Path) -> None:
    drawn = [{"kind": "pictures", "step": 4, "names": [name]} for name in ("a", "b")]
    journal = lines_of(run(0), drawn[0], run(4), drawn[1])
    assert [record["names"] for record in counting(tmp_path, journal, "pictures")] == [["b"]]
    journal = lines_of(run(0), drawn[0], run(2), step(3))
    assert counting(tmp_path, journal, "pictures") == []


def test_a_run_that_starts_over_drops_every_earlier_step(tmp_path: Path) -> None:
    assert counting(tmp_path, lines_of(run(0), step(1), run(0))) == [run(0), run(0)]


def test_the_records_of_one_kind_are_those_of_all_that_are_of_it(tmp_path: Path) -> None:
    evals = [{"kind": "eval", "step": number, "metrics": {"run": 1.0}} for number in (2, 4, 6)]
    journal = lines_of(run(0), step(1), evals[0], evals[1], evals[2], run(4), step(5, disp={"eval": "x"}), evals[2])
    every = counting(tmp_path, journal)
    assert counting(tmp_path, journal, "eval") == [r for r in every if r["kind"] == "eval"] == evals
    assert counting(tmp_path, journal, "step", "run") == [r for r in every if r["kind"] in ("step", "run")]


def test_a_folder_without_a_journal_has_no_records(tmp_path: Path) -> None:
    assert records.read_journal(LocalStorage(tmp_path)) == []


def test_a_missing_journal_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere\.jsonl: no journal"):
        records.read_journal(tmp_path / "nowhere.jsonl")


def test_what_is_not_finite_becomes_null_and_is_named() -> None:
    record = {"loss": math.nan, "terms": {"a": -math.inf, "b": np.float32(2.5)}, "all": [1.0, math.inf], "ok": True}
    clean = records.strict(record)
    assert clean == {
        "loss": None,
        "terms": {"a": None, "b": 2.5},
        "all": [1.0, None],
        "ok": True,
        "nonfinite": ["loss", "terms.a", "all.1"],
    }
    assert "nonfinite" not in records.strict({"loss": 1.0})


def test_tensors_arrays_paths_and_numpy_scalars_become_plain_values() -> None:
    clean = records.strict({"t": torch.tensor(3), "n": np.int64(4), "p": Path("a/b"), "v": np.ones(2), "x": (1, "y")})
    assert json.loads(json.dumps(clean)) == {"t": 3, "n": 4, "p": "a/b", "v": [1.0, 1.0], "x": [1, "y"]}


def test_a_value_that_cannot_be_journalled_is_named() -> None:
    with pytest.raises(TaskError, match=r"metrics\.boxes is .* of type object"):
        records.strict({"metrics": {"boxes": object()}})


@pytest.mark.parametrize(
    ("seconds", "long", "short"), [(0.0, "00:00", "0:00"), (83.9, "01:23", "1:23"), (3723, "1:02:03", "1:02:03")]
)
def test_durations_read_as_clocks(seconds: float, long: str, short: str) -> None:
    assert (records.interval(seconds), records.eta(seconds)) == (long, short)


def test_log_lines_open_with_time_and_level() -> None:
    line = heritage_log.log_line("hello", 1_700_000_000.5875)
    assert line[4] == "-" and line[19:] == ",587   INFO  hello"


def test_train_lines_equal_the_heritages() -> None:
    """Rebuilds the records behind golden lines; 3 epochs of 4 steps, LINE_EVERY 2."""
    golden = [line for line in GOLDEN.read_text().splitlines() if line.startswith("Train:")]
    run_record = run(0, time=0.0, steps_per_epoch=4, num_epochs=3, line_every=2)
    losses = [3.10263, 3.052227, 2.893408, 2.562212, 2.077626, 1.781906]
    rates = [3e-4, 6.954e-4, 1.65e-3, 2.605e-3, 3e-3, 2.886e-3]
    timing = [(0.01, 0.08), (0.0, 0.04), (0.0, 0.03), (0.0, 0.04), (0.0, 0.04), (0.0, 0.03)]
    train_lines = heritage_log.TrainLines(run_record)
    lines = []
    for index, (loss, lr, (data_s, step_s)) in enumerate(zip(losses, rates, timing, strict=True)):
        epoch, iteration = divmod(index, 4)
        times = {"data_s": data_s, "step_s": step_s}
        record = step(index + 1, epoch=epoch, iteration=iteration, loss=loss, lr=lr, samples=2, **times)
        lines.append(train_lines.line({**record, "time": 0.05 * index + 0.08}))
    assert lines.pop(2) is None  # step 3: neither due nor at an end of the epoch
    without_times = [line.split("  Data time")[0] for line in lines if line]
    assert without_times == [line.split("  Data time")[0] for line in golden[:5]]
    assert lines[0] == golden[0]
    assert lines[2] == golden[2]


def test_a_loss_that_was_nan_does_not_hide_the_epochs_average() -> None:
    train_lines = heritage_log.TrainLines(run(0, steps_per_epoch=2, num_epochs=1, line_every=1))
    common = {"epoch": 0, "lr": 0.1, "samples": 1, "data_s": 0.0, "step_s": 1.0}
    train_lines.line(step(1, iteration=0, loss=2.0, **common))
    assert "Loss: nan (2.00)" in str(train_lines.line(step(2, iteration=1, loss=None, **common)))


def test_the_header_has_the_heritages_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    arguments = {"cfg_file": "cfgs/toy_models/tiny.yaml", "merge_all_iters_to_one_epoch": False}
    lines = heritage_log.header_lines(arguments, {"A": 1, "MODEL": {"BACKBONE_2D": {"NAME": "x"}}}, None)
    golden = GOLDEN.read_text().splitlines()
    assert all(line in golden for line in lines[:1] + lines[2:5])
    assert lines[1] == "CUDA_VISIBLE_DEVICES=ALL"
    assert lines[5:] == [
        "cfg.A: 1",
        "----------- MODEL -----------",
        "----------- BACKBONE_2D -----------",
        "cfg.MODEL.BACKBONE_2D.NAME: x",
    ]
    assert "total_batch_size: 16" in heritage_log.header_lines({}, {}, 16)[2]


def test_the_model_is_named_with_its_parameter_count() -> None:
    class PointPillar(torch.nn.Linear):
        pass

    first, tree = heritage_log.model_lines(PointPillar(26575, 1))
    assert first in GOLDEN.read_text().splitlines()
    assert tree.startswith("PointPillar(")


def test_evaluation_lines_equal_the_heritages() -> None:
    record = {"epoch": 2, "samples": 8, "seconds": 0.0256, "metrics": {"recall_roi_0.3": 0.0}}
    lines = heritage_log.eval_lines(record, "toy_models/tiny(demo)")
    golden = GOLDEN.read_text().splitlines()
    assert lines.pop(4) == "recall_roi_0.3: 0.000000"
    start = golden.index(lines[0])
    assert lines[:-1] == golden[start : start + len(lines) - 1]
    assert lines[-1] in golden
