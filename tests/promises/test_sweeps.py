"""Sweeps on real Ray: each scheduler and search, the same seed, what fails, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import commanded
from ray_nodes import ray_nodes
from runs import Run, assert_same_bits
from sweeps import (
    CLIP,
    EPOCHS,
    LR,
    PBT,
    SCHEDULERS,
    SPACE,
    Undisturbed,
    assert_whole,
    count,
    flags,
    ledger,
    started,
    sweep,
    swept,
    told,
    under,
)

import raytrain
from raytrain.cli import main
from raytrain.config.load import dump_config
from raytrain.errors import ConfigError, PreflightError, ResumeError, TrainingError
from raytrain.sweep.ledger import trial_folder
from raytrain.sweep.lineage import lineages_of
from raytrain.sweep.view import view_of

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_sweep_under_each_scheduler_leaves_whole_runs_and_nothing_else(
    scheduler: str, undisturbed_sweep: Undisturbed
) -> None:
    run = undisturbed_sweep(scheduler)
    view = view_of(ledger(run))
    assert view.counts()["done"] + view.counts()["stopped"] == 4
    assert view.counts()["done"] >= 1
    assert_whole(run, view)
    pids = {(run.run_dir / trial_folder(number) / ".lock").read_text().split()[1] for number in view.trials}
    assert len(pids) <= 2, "more processes than trials at a time"


def test_a_population_that_is_evaluated_more_rarely_than_it_is_to_change_changes_after_each_evaluation(
    tmp_path: Path, ray_address: str
) -> None:
    run = sweep(tmp_path, {**PBT, "UNIT": "step", "PERTURB_EVERY": 3}, **{"OPTIMIZATION.NUM_EPOCHS": 3})
    assert swept(run).view.counts()["done"] == 4
    clones = [record["epoch"] for record in ledger(run) if record["kind"] == "clone"]
    assert clones == [1, 1, 2, 2]


@pytest.mark.parametrize("search", ["grid", "tpe", "gp"])
def test_each_search_brings_a_sweep_to_its_end(search: str, tmp_path: Path, ray_address: str) -> None:
    space = {LR: {"choice": [0.01, 0.1, 0.2]}, CLIP: {"choice": [0.1, 1.0, 2.0, 10.0]}} if search == "grid" else SPACE
    run = sweep(tmp_path, {"SEARCH": search, "SPACE": space, "NUM_SAMPLES": 12}, **{"OPTIMIZATION.NUM_EPOCHS": 1})
    view = swept(run).view
    assert view.counts()["done"] == 12
    assert len({str(trial.params) for trial in view.trials.values()}) == 12
    assert_whole(run, view)


@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
def test_the_same_seed_gives_the_same_trials_results_and_decisions(
    scheduler: str, tmp_path: Path, undisturbed_sweep: Undisturbed
) -> None:
    run = sweep(tmp_path, under(scheduler))
    swept(run)
    assert told(run) == told(undisturbed_sweep(scheduler))


@pytest.mark.parametrize("scheduler", ["none", "asha", "pbt"])
def test_best_yaml_trains_to_the_bits_of_the_best_trial(
    scheduler: str, tmp_path: Path, undisturbed_sweep: Undisturbed
) -> None:
    run = undisturbed_sweep(scheduler)
    best = view_of(ledger(run)).best
    assert best is not None
    assert bool(best.clones) == (scheduler == "pbt")
    cfg = raytrain.load_config(run.run_dir / "best.yaml", ["OUTPUT", str(tmp_path)])
    assert bool(cfg.OPTIMIZATION.PHASES) == (scheduler == "pbt")
    raytrain.train(cfg, num_workers=0, quiet=True)
    name = f"ckpt/checkpoint_epoch_{best.epoch}/checkpoint.pth"
    trial, alone = (
        torch.load(next(folder.rglob(name)), weights_only=True)["model_state"]
        for folder in (run.run_dir / trial_folder(best.number), tmp_path)
    )
    assert_same_bits(alone, trial)


def test_a_population_of_two_workers_each_clones_inside_its_places_on_a_cluster_of_two_cpus(tmp_path: Path) -> None:
    options = {**under("pbt"), "CONCURRENT": None, "NUM_SAMPLES": 2}
    run = sweep(tmp_path, options, **{"SCALE.NUM_WORKERS": 2, "OPTIMIZATION.NUM_EPOCHS": 2})
    with ray_nodes() as nodes:
        nodes.add()
        started(run, "--address", nodes.address).ended(0)
        view = view_of(ledger(run))
        assert view.counts()["done"] == 2
        assert_whole(run, view)
        clone = next(trial for trial in view.trials.values() if trial.clones)
        cfg = lineages_of(ledger(run))[clone.number].config(raytrain.load_config(run.run_dir / "sweep.yaml"), 0)
        assert cfg.OPTIMIZATION.PHASES
        (tmp_path / "alone.yaml").write_text(dump_config(cfg.model_copy(update={"OUTPUT": str(tmp_path / "alone")})))
        commanded(["train", "--cfg_file", "alone.yaml", "--address", nodes.address], tmp_path).ended(0)
    name = "ckpt/checkpoint_epoch_2/checkpoint.pth"
    trial, alone = (
        torch.load(next(folder.rglob(name)), weights_only=True)["model_state"]
        for folder in (run.run_dir / trial_folder(clone.number), tmp_path / "alone")
    )
    assert_same_bits(alone, trial)


def with_bad_trials(folder: Path, allowed: int) -> Run:
    """Of four trials every other one raises in its second epoch."""
    bad = folder / "bad"
    bad.mkdir()
    (bad / "fail").write_text("15")
    space = {"DATA_CONFIG.GATE": {"grid": [str(folder / "good"), str(bad)]}, LR: SPACE[LR]}
    return sweep(folder, {"SPACE": space, "NUM_SAMPLES": 2, "MAX_FAILED": allowed, "CONCURRENT": 1})


def test_a_trial_that_raises_is_listed_with_its_error_and_the_sweep_goes_on(tmp_path: Path, ray_address: str) -> None:
    run = with_bad_trials(tmp_path, allowed=2)
    result = swept(run)
    assert result.status == "finished"
    states = {number: (trial.state, trial.epoch) for number, trial in sorted(result.view.trials.items())}
    assert states == {0: ("done", EPOCHS), 1: ("failed", 1), 2: ("done", EPOCHS), 3: ("failed", 1)}
    failed = result.view.trials[1]
    assert "failed at step 15, as the test wished" in str(failed.error)
    assert Path(str(failed.logs)).is_dir()
    assert result.view.best is not None and result.view.best.state == "done"
    assert len(swept(run).view.trials) == 4  # not twice as many with each launch


def test_trials_whose_values_do_not_go_together_or_whose_task_exits_say_so(tmp_path: Path, ray_address: str) -> None:
    space = {"OPTIMIZATION.COMPILE": {"grid": [False]}, "OPTIMIZATION.CUDA_GRAPHS": {"grid": [False, True]}}
    run = sweep(tmp_path, {"SPACE": space, "NUM_SAMPLES": 1, "MAX_FAILED": 2}, **{"OPTIMIZATION.COMPILE": True})
    (run.gate / "exit").write_text("15")
    trials = swept(run).view.trials
    assert [(trial.state, trial.epoch) for _, trial in sorted(trials.items())] == [("failed", 1), ("failed", 0)]
    assert "the task has seen enough" in str(trials[0].error)
    assert "CUDA_GRAPHS" in str(trials[1].error) and "COMPILE" in str(trials[1].error)


def test_more_failed_trials_than_allowed_end_the_sweep(
    tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_bad_trials(tmp_path, allowed=0)
    assert main(flags(run)) == 1
    said = capsys.readouterr().err
    assert "TUNE.MAX_FAILED 0" in said and "failed at step 15, as the test wished" in said
    assert count(run, "done") == 1


def test_a_sweep_gets_more_trials_and_more_epochs(tmp_path: Path, ray_address: str) -> None:
    run = sweep(tmp_path, {"NUM_SAMPLES": 2}, **{"TASK": "tasks_for_tests:Longer", "OPTIMIZATION.NUM_EPOCHS": 2})
    swept(run)
    first = told(run)
    assert swept(run).view.counts()["done"] == 2
    assert told(run) == first
    assert swept(run, extend=1).view.counts()["done"] == 3
    assert {number: records for number, records in told(run).items() if number < 2} == first
    view = swept(run, "OPTIMIZATION.NUM_EPOCHS", "3").view
    assert [trial.epoch for trial in view.trials.values()] == [3, 3, 3]
    assert [len(records) for records in told(run, "result").values()] == [3, 3, 3]
    assert len((run.gate / "uses.txt").read_text().splitlines()) == 3 * 3 * 11  # each step once


def test_a_sweep_is_refused_with_another_config(tmp_path: Path, ray_address: str) -> None:
    run = sweep(tmp_path, {"NUM_SAMPLES": 1}, **{"OPTIMIZATION.NUM_EPOCHS": 1})
    swept(run)
    before = ledger(run)
    with pytest.raises(ResumeError, match=r"OPTIMIZATION\.WEIGHT_DECAY: was .*now 0\.5"):
        swept(run, "OPTIMIZATION.WEIGHT_DECAY", "0.5")
    with pytest.raises(ResumeError, match=r"TUNE\.SCHEDULER: was none, now asha"):
        swept(run, "TUNE.SCHEDULER", "asha")
    (run.run_dir / "sweep.yaml").write_text("TUNE: [")
    with pytest.raises(ResumeError, match=r"sweep\.yaml[^$]*What to do: put sweep\.yaml of this sweep back"):
        swept(run)
    assert ledger(run) == before


def test_a_sweep_that_cannot_be_is_refused_before_anything_starts(tmp_path: Path, ray_address: str) -> None:
    run = sweep(tmp_path)
    with pytest.raises(ConfigError, match=r"TUNE\.METRIC is 'beauty', which Exact does not give; it gives accuracy"):
        swept(run, "TUNE.METRIC", "beauty")
    with pytest.raises(PreflightError, match=r"TUNE\.CONCURRENT is 9, but this cluster can hold only 8 trials"):
        swept(run, "TUNE.CONCURRENT", "9")
    with pytest.raises(ConfigError, match=r"TUNE\.SPACE is empty"):
        swept(sweep(tmp_path, {"SPACE": {}}))
    (run.gate / "spoil_score").touch()
    told = r"A look at the task, before any trial, failed(.*\n)*.*tasks_for_tests\.py"
    with pytest.raises(TrainingError, match=told):
        swept(sweep(tmp_path))
    assert not ledger(run)
    assert not list(run.run_dir.glob("trial_*"))


def test_a_population_is_not_extended(undisturbed_sweep: Undisturbed) -> None:
    before = ledger(undisturbed_sweep("pbt"))
    with pytest.raises(ResumeError, match="a population of 4, and 5 are asked for"):
        swept(undisturbed_sweep("pbt"), extend=1)
    assert ledger(undisturbed_sweep("pbt")) == before


@pytest.mark.parametrize(("budget", "raised"), [({"EPOCHS": 5}, "EPOCHS"), ({"SECONDS": 5.0}, "SECONDS")])
def test_a_budget_ends_a_sweep_which_goes_on_with_a_larger_one(
    budget: dict[str, Any], raised: str, tmp_path: Path, undisturbed_sweep: Undisturbed
) -> None:
    run = sweep(tmp_path, {"BUDGET": budget})
    if raised == "SECONDS":
        (run.gate / "slow").write_text("0.3")
    began = time.monotonic()
    assert swept(run).status == "spent"
    assert time.monotonic() - began < 20
    assert count(run, "result") < 4 * EPOCHS
    assert count(run, "result") <= 6 or raised == "SECONDS"  # one trial was training beside the one that used it up
    if raised == "SECONDS":
        return
    assert swept(run, f"TUNE.BUDGET.{raised}", "1000").status == "finished"
    assert told(run, "trial", "result") == told(undisturbed_sweep("none"), "trial", "result")


@pytest.mark.parametrize("command", ["train", "tune"])
def test_names_that_the_terminal_cannot_encode_end_no_run(tmp_path: Path, command: str) -> None:
    score = '    def score(self, *given):\n        return {"Güte": super().score(*given)["accuracy"]}\n'
    task = f"from tasks_for_tests import Exact\nclass Mine(Exact):\n{score}"
    (tmp_path / "mine.py").write_text(task, encoding="utf-8")
    tuned = {"METRIC": "Güte", "NUM_SAMPLES": 1, "SPACE": {LR: {"grid": [0.01]}}}
    kept = {"CHECKPOINT.METRIC": "Güte", "OPTIMIZATION.NUM_EPOCHS": 1, "SCALE.NUM_WORKERS": int(command == "tune")}
    run = Run(tmp_path, {"TASK": "mine:Mine", "TUNE": tuned, **kept})
    words = [command, *run.words("--extra_tag", "größe")[1:]]
    said = commanded(words, tmp_path, {"PYTHONIOENCODING": "ascii"}).ended(0)
    assert r"gr\xf6\xdfe" in said and r"G\xfcte" in said
    assert (tmp_path / "output/run/größe").is_dir()
