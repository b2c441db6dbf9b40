"""What a sweep keeps of itself, and what its best.yaml says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytrain.config.load import dump_config
from raytrain.config.sections import Config
from raytrain.errors import ConfigError, ResumeError
from raytrain.journal.run_folder import RunFolder
from raytrain.sweep.ledger import LEDGER
from raytrain.sweep.sweep import BEST, CONFIG, Sweep, check_same
from raytrain.sweep.tune import SweepOptions, number_of_samples, tune

LR, CLIP = "OPTIMIZATION.LR", "OPTIMIZATION.GRAD_NORM_CLIP"
SPACE = {LR: {"loguniform": [1e-4, 1e-1]}, CLIP: {"grid": [1.0, 10.0]}}


def config(folder: Path, epochs: int = 2, **sections: Any) -> Config:
    return Config(
        TASK="pkg.module:Class",
        OUTPUT=str(folder),
        OPTIMIZATION={"BATCH_SIZE_PER_GPU": 4, "NUM_EPOCHS": epochs},
        **{"TUNE": {"SPACE": SPACE}, **sections},
    )


@contextlib.contextmanager
def launched(cfg: Config, folder: Path, begins: bool = True) -> Iterator[Sweep]:
    """A launch; with `begins`, the ledger tells of it already."""
    (folder / "sweep").mkdir(parents=True, exist_ok=True)
    run = RunFolder(str(folder / "sweep"), LEDGER)
    with contextlib.closing(run), run.locked(), contextlib.closing(Sweep(cfg, run)) as sweep:
        if begins:
            sweep.note("sweep", num_epochs=cfg.OPTIMIZATION.NUM_EPOCHS, metric="accuracy", mode="max", num_samples=1)
        yield sweep


def trained(sweep: Sweep, *epochs: int) -> None:
    sweep.add_trial(0, {LR: 0.01, CLIP: 1.0})
    for epoch in epochs:
        key = sweep.lineages[0].key(epoch)
        result = {"epoch": epoch, "step": epoch, "value": epoch / 10, "metrics": {}, "seconds": 1.0, "key": key}
        sweep.add_result(0, result)


def test_the_best_config_is_of_the_workers_that_a_trial_had(tmp_path: Path) -> None:
    for asked, workers in ((None, 1), (3, 3)):
        folder = tmp_path / str(asked)
        with launched(config(folder, SCALE={"NUM_WORKERS": asked}), folder) as sweep:
            trained(sweep, 1)
            best = sweep.write_best()
        assert best is not None
        assert (workers, workers) == (best.SCALE.NUM_WORKERS, best.SCALE.VIRTUAL_WORKERS)


def test_no_file_of_a_sweep_holds_a_secret(tmp_path: Path) -> None:
    cfg = config(tmp_path, EXTRA_TAG="kept").model_copy(update={"OUTPUT": "s3://KEY:sesame@bucket/runs"})
    with launched(cfg, tmp_path) as sweep:
        trained(sweep, 1)
        sweep.write_config()
        sweep.write_best()
    written = {path.name: path.read_text() for path in (tmp_path / "sweep").iterdir() if path.suffix == ".yaml"}
    assert written.keys() == {CONFIG, BEST}
    assert not any("sesame" in text for text in written.values())


def test_a_trial_that_was_made_longer_is_said_to_be_no_run_of_that_length(tmp_path: Path) -> None:
    with launched(config(tmp_path), tmp_path) as sweep:
        trained(sweep, 1, 2)
        assert sweep.lengthened() == []
    with launched(config(tmp_path, epochs=4), tmp_path) as sweep:
        trained(sweep, 3, 4)
        (line,) = sweep.lengthened()
    assert "trial 0 was begun as a run of 2 epochs and made longer" in line and BEST in line


def test_a_sweep_is_not_made_shorter_than_its_trials_are(tmp_path: Path) -> None:
    with launched(config(tmp_path, epochs=4), tmp_path) as sweep:
        trained(sweep, 1, 2, 3)
    with launched(config(tmp_path, epochs=3), tmp_path, begins=False) as sweep:
        sweep.check_length()
        assert "as a run of 4 epochs and made shorter" in sweep.lengthened()[0]
    short = config(tmp_path, epochs=2)
    with (
        launched(short, tmp_path, begins=False) as sweep,
        pytest.raises(ResumeError, match=r"trials of up to 3 epochs, and OPTIMIZATION.NUM_EPOCHS is 2\. .*--epochs 3"),
    ):
        sweep.check_length()


def test_a_grid_is_not_extended_in_silence(tmp_path: Path) -> None:
    for search, space in (("random", {CLIP: {"grid": [1.0, 10.0]}}), ("grid", {CLIP: {"choice": [1.0, 10.0]}})):
        cfg = config(tmp_path, TUNE={"SPACE": space, "SEARCH": search})
        with pytest.raises(ConfigError, match=r"--extend 3: .* as many trials as it has points \(2\)\. Leave --extend"):
            tune(cfg, SweepOptions(extend=3))


def test_a_damaged_line_of_the_ledger_costs_no_result_but_its_own(tmp_path: Path) -> None:
    with launched(config(tmp_path, epochs=3), tmp_path) as sweep:
        trained(sweep, 1, 2, 3)
    ledger = tmp_path / "sweep" / LEDGER
    lines = ledger.read_text().splitlines(keepends=True)
    first = next(index for index, line in enumerate(lines) if '"result"' in line)
    ledger.write_text("".join([*lines[:first], "{ damaged\n", *lines[first + 1 :]]))
    with launched(config(tmp_path, epochs=3), tmp_path) as sweep:
        trained(sweep, 1, 2, 3)
        assert [point[0] for point in sweep.view.trials[0].curve] == [1, 2, 3]
        assert sweep.view.best is not None and sweep.view.best.best == 0.3
        assert sweep.view.trials[0].trained == 3, "what was known is not counted again"


def test_a_space_in_another_order_is_another_sweep(tmp_path: Path) -> None:
    with launched(config(tmp_path), tmp_path) as sweep:
        sweep.write_config()
        check_same(config(tmp_path), sweep.folder)
        turned = config(tmp_path, TUNE={"SPACE": dict(reversed(SPACE.items()))})
        assert "SPACE" in dump_config(turned)
        with pytest.raises(ResumeError, match=rf"keys in another order \({LR}, {CLIP}\)"):
            check_same(turned, sweep.folder)


def test_a_sweep_that_bohb_chose_the_trials_of_is_not_gone_on_with_and_says_what_to_use(tmp_path: Path) -> None:
    with launched(config(tmp_path), tmp_path) as sweep:
        written = dump_config(config(tmp_path)).replace("SEARCH: random", "SEARCH: bohb")
        (tmp_path / "sweep" / CONFIG).write_text(written)
        with pytest.raises(
            ResumeError, match=r"BOHB was removed; use SEARCH tpe with SCHEDULER hyperband .*--extra_tag"
        ):
            check_same(config(tmp_path), sweep.folder)


def test_code_that_has_changed_since_any_earlier_launch_is_told_and_a_ledger_from_before_tells_none(
    tmp_path: Path,
) -> None:
    now, line = {"t.py": "b"}, "note: the task's code differs from an earlier launch's, whose results are kept: "
    sources = ({}, {"source": {"t.py": "a"}}, {"source": now}, {"source": now})
    for source, told in zip(sources, ([], [], [f"{line}t.py has changed"], [f"{line}t.py has changed"]), strict=True):
        with launched(config(tmp_path), tmp_path, begins=False) as sweep:
            assert sweep.other_source(now) == told
            sweep.note("sweep", num_epochs=2, **source)


def test_a_sweep_of_another_file_of_the_same_name_is_told(tmp_path: Path) -> None:
    files = [tmp_path / folder / "x.yaml" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text("")
    first, second = (config(tmp_path, CFG_FILE=str(file)) for file in files)
    with launched(first, tmp_path) as sweep:
        assert check_same(first, sweep.folder) == []
        sweep.write_config()
        assert check_same(first, sweep.folder) == []
        (line,) = check_same(second, sweep.folder)
        assert f"begun by {files[0]}, and this is {files[1]}" in line and "--extra_tag NAME" in line
        files[0].unlink()
        (line,) = check_same(second, sweep.folder)
        assert line.endswith(f"{files[0]}, which is not here: taken to be {files[1]}, moved")


def told(sweep: Sweep, number: int, epoch: int) -> None:
    """A result of the trial as this launch has it."""
    key = sweep._replayed[number].key(epoch)
    result = {"epoch": epoch, "step": epoch, "value": 0.5, "metrics": {}, "seconds": 1.0, "key": key}
    sweep.add_result(number, result)


def test_a_clone_that_a_later_launch_does_not_repeat_is_the_trial_that_it_was(tmp_path: Path) -> None:
    first, second, perturbed = ({LR: lr, CLIP: 1.0} for lr in (0.01, 0.02, 0.03))
    with launched(config(tmp_path), tmp_path) as sweep:
        for number, params in enumerate((first, second)):
            sweep.add_trial(number, params)
            told(sweep, number, 1)
        sweep.add_clone(0, 1, 1, perturbed)
        told(sweep, 0, 2)
        assert sweep.view.trials[0].params == perturbed
    with launched(config(tmp_path), tmp_path) as sweep:
        told(sweep, 0, 1)
        told(sweep, 0, 2)
        assert sweep.view.trials[0].params == first
        assert sweep.view.trials[0].trained == 3, "of epochs 1 and 2, and of 2 again, of other weights"
    with launched(config(tmp_path), tmp_path) as sweep:
        trial, lineage = sweep.view.trials[0], sweep.lineages[0]
        assert (lineage.base, lineage.phases, trial.params, trial.clones) == (first, (), first, [])
        assert [point[0] for point in trial.curve] == [1, 2]
        assert (sweep.first_params[0], sweep.lineages[1].base) == (first, second)


def test_trials_that_extend_adds_are_added_once_where_the_launch_did_not_come_to_its_end(tmp_path: Path) -> None:
    cfg = config(tmp_path, TUNE={"SPACE": SPACE, "NUM_SAMPLES": 2})
    asked, counts = SweepOptions(extend=3), []
    for status in (None, "stopped", "finished", "finished"):
        with launched(cfg, tmp_path, begins=False) as sweep:
            samples = number_of_samples(sweep, asked)
            sweep.note("sweep", samples=samples, extend=3, num_epochs=2)
            if status is not None:
                sweep.note("end", status=status)
            counts.append(samples)
    assert counts == [5, 5, 5, 8]
