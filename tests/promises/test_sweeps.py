"""Sweeps on real Ray: each scheduler and search, the same seed, kills at any moment, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from ray_nodes import ray_nodes
from runs import Launched, Run, alive, assert_same_bits, environment, family, wait_for

import raytrain
from raytrain.cli import main
from raytrain.errors import ConfigError, PreflightError, ResumeError
from raytrain.ledger import SweepView, read_ledger, trial_folder, view_of
from raytrain.records import Record, read_journal
from raytrain.storage import open_storage
from raytrain.store import newest_verified
from raytrain.tune import SweepOptions, SweepResult, tune

pytestmark = pytest.mark.ray

EPOCHS = 4
LR, CLIP = "OPTIMIZATION.LR", "OPTIMIZATION.GRAD_NORM_CLIP"
SPACE = {LR: {"loguniform": [1e-4, 1.0]}, CLIP: {"loguniform": [0.1, 10.0]}}
SCHEDULERS = ("none", "asha", "hyperband", "median", "pbt", "pb2")
PBT = {"SCHEDULER": "pbt", "PERTURB_EVERY": 1, "QUANTILE": 0.5}

Undisturbed = Callable[[str], Run]


def sweep(folder: Path, tune_cfg: dict[str, Any] | None = None, **changes: Any) -> Run:
    """Four trials, of one worker unless `changes` say otherwise."""
    own = {"SPACE": copy.deepcopy(SPACE), "METRIC": "accuracy", "NUM_SAMPLES": 4, "CONCURRENT": 2, "REDUCTION": 2}
    told = {"TUNE": {**own, **(tune_cfg or {})}, "OPTIMIZATION.NUM_EPOCHS": EPOCHS, "SCALE.NUM_WORKERS": 1}
    return Run(folder, {**told, **changes})


def under(scheduler: str) -> dict[str, Any]:
    return PBT if scheduler == "pbt" else {"SCHEDULER": scheduler, "PERTURB_EVERY": 1}


def swept(run: Run, *words: str, extend: int = 0) -> SweepResult:
    """The sweep, begun or gone on with in this process, on the cluster that it is connected to."""
    cfg = raytrain.load_config(run.config_file, ["OUTPUT", str(run.folder / "output"), *words])
    return tune(cfg, SweepOptions(extend=extend))


def flags(run: Run, *more: str) -> list[str]:
    return ["tune", *run.words(*more)[1:]]


def started(run: Run, *more: str) -> Launched:
    """The command, in a process group and on a cluster of its own."""
    return Launched([sys.executable, "-m", "raytrain", *flags(run, *more)], run.folder, environment())


def ledger(run: Run) -> list[Record]:
    return read_ledger(open_storage(str(run.run_dir)))


def told(run: Run, *kinds: str) -> dict[int, list[Record]]:
    """By trial its records of these kinds, without what time decides."""
    found: dict[int, list[Record]] = {}
    for record in ledger(run):
        if record["kind"] in (kinds or ("trial", "result", "clone", "stopped", "done")):
            own = {key: value for key, value in record.items() if key not in ("time", "seconds")}
            found.setdefault(record["trial"], []).append(own)
    return found


def count(run: Run, kind: str) -> int:
    return sum(record["kind"] == kind for record in ledger(run))


def journals(run: Run, view: SweepView, state: str = "done") -> dict[int, bytes]:
    """Of the trials in that state."""
    ended = [number for number, trial in view.trials.items() if trial.state == state]
    return {number: (run.run_dir / trial_folder(number) / "journal.jsonl").read_bytes() for number in ended}


def assert_whole(run: Run, view: SweepView) -> None:
    """All that a sweep leaves is there and nothing else; each trial is a run folder that ends where the trial does."""
    names = {path.name for path in run.run_dir.iterdir()}
    assert {"sweep.yaml", "sweep.jsonl", "sweep.csv", "best.yaml", "sweep.html"} <= names
    assert "tune" not in names
    for number, trial in view.trials.items():
        folder = run.run_dir / trial_folder(number)
        newest, passed_over = newest_verified(open_storage(str(folder)))
        assert newest is not None and not passed_over
        progress = newest.manifest.progress
        assert (progress.epoch, progress.cursor) == (trial.epoch, 0), f"trial {number} {trial.state} at {trial.epoch}"
        evals = [record for record in read_journal(folder / "journal.jsonl") if record["kind"] == "eval"]
        assert [record["epoch"] for record in evals][-1] == trial.epoch
        assert list((folder / "tensorboard").rglob("events.*"))
    wait_for(lambda: not actors(), "the end of all trials' processes")


def actors() -> list[int]:
    """Processes of trials below this one."""

    def trains(pid: int) -> bool:
        try:
            return b"TrialActor" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    return [pid for pid in family(os.getpid()) if trains(pid) and alive(pid)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Undisturbed:
    """A finished sweep under a scheduler, trained once."""
    runs: dict[str, Run] = {}

    def of(scheduler: str) -> Run:
        if scheduler not in runs:
            runs[scheduler] = sweep(tmp_path_factory.mktemp(scheduler), under(scheduler))
            assert swept(runs[scheduler]).status == "finished"
        return runs[scheduler]

    return of


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_sweep_under_each_scheduler_leaves_whole_runs_and_nothing_else(
    scheduler: str, undisturbed: Undisturbed
) -> None:
    run = undisturbed(scheduler)
    view = view_of(ledger(run))
    assert view.counts()["done"] + view.counts()["stopped"] == 4
    assert view.counts()["done"] >= 1
    assert_whole(run, view)


@pytest.mark.parametrize("search", ["random", "grid", "tpe", "gp", "bohb"])
def test_each_search_brings_a_sweep_to_its_end(search: str, tmp_path: Path, ray_address: str) -> None:
    if search == "bohb" and not all(map(importlib.util.find_spec, ("hpbandster", "ConfigSpace"))):
        pytest.skip("needs hpbandster and ConfigSpace")
    space = {LR: {"choice": [0.01, 0.1, 0.2]}, CLIP: {"choice": [0.1, 1.0, 2.0, 10.0]}} if search == "grid" else SPACE
    run = sweep(tmp_path, {"SEARCH": search, "SPACE": space, "NUM_SAMPLES": 12}, **{"OPTIMIZATION.NUM_EPOCHS": 1})
    view = swept(run).view
    assert view.counts()["done"] == 12
    assert len({str(trial.params) for trial in view.trials.values()}) == 12
    assert_whole(run, view)


@pytest.mark.parametrize("scheduler", ["none", "hyperband"])
def test_the_same_seed_gives_the_same_trials_results_and_decisions(
    scheduler: str, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    run = sweep(tmp_path, under(scheduler))
    swept(run)
    assert told(run) == told(undisturbed(scheduler))


@pytest.mark.parametrize("scheduler", ["none", "asha"])
def test_best_yaml_trains_to_the_bits_of_the_best_trial(
    scheduler: str, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    run = undisturbed(scheduler)
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


@pytest.mark.parametrize("scheduler", ["none", "hyperband"])
def test_a_sweep_whose_driver_is_killed_goes_on_and_trains_no_result_twice(
    scheduler: str, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    run = sweep(tmp_path, under(scheduler))
    (run.gate / "slow").write_text("0.03")
    launched = started(run)
    if scheduler == "none":
        wait_for(lambda: count(run, "done"), "a trial that is done")
    else:
        wait_for(
            lambda: any(len(records) > 1 for records in told(run, "result").values()), "a second result of a trial"
        )
    run.hold(0)
    pids = wait_for(lambda: [int(path.name[5:]) for path in run.gate.glob("held-*")], "a trial in mid-epoch")
    launched.kill(pids)
    (run.gate / "slow").unlink()
    run.release()
    before = view_of(ledger(run))
    kept = journals(run, before)
    assert swept(run).status == "finished"
    expected = told(undisturbed(scheduler), "trial", "result", "clone")
    assert told(run, "trial", "result", "clone") == expected
    assert {number: journals(run, view_of(ledger(run)))[number] for number in kept} == kept
    assert_whole(run, view_of(ledger(run)))


@pytest.mark.parametrize("scheduler", ["none"])
def test_a_trial_whose_process_is_killed_goes_on_from_its_state(
    scheduler: str, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    run = sweep(tmp_path, under(scheduler))
    run.hold(26)
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(swept, run)
        os.kill(held(run, ending), signal.SIGKILL)
        run.release()
        view = ending.result().view
    assert told(run, "trial", "result", "clone") == told(undisturbed(scheduler), "trial", "result", "clone")
    uses = [line.split()[0] for line in (run.gate / "uses.txt").read_text().splitlines()]
    assert uses.count("0") == 4  # none has begun anew
    assert_whole(run, view)


def held(run: Run, ending: Future[Any]) -> int:
    """Pid of a process that waits at the gate."""
    found = wait_for(lambda: ending.done() or list(run.gate.glob("held-*")), "a trial at the gate")
    assert found is not True, ending.result()
    return int(found[0].name[5:])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_sweep_with_its_states_saved_and_the_same_command_goes_on(
    number: signal.Signals, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    run = sweep(tmp_path)
    (run.gate / "slow").write_text("0.03")
    launched = started(run)
    wait_for(lambda: count(run, "result"), "a first result")
    below, began = set(family(launched.pid)), time.monotonic()
    os.kill(launched.pid, number)
    assert "the same command goes on" in launched.ended(75)
    assert time.monotonic() - began < 30
    wait_for(lambda: not any(map(alive, below)), "the end of all its processes")
    (run.gate / "slow").unlink()
    uses = len((run.gate / "uses.txt").read_text().splitlines())
    assert swept(run).status == "finished"
    assert told(run, "trial", "result") == told(undisturbed("none"), "trial", "result")
    assert len((run.gate / "uses.txt").read_text().splitlines()) == 4 * EPOCHS * 11 > uses  # each step once


def test_trials_of_two_workers_train_inside_their_places_on_a_cluster_of_two_cpus(tmp_path: Path) -> None:
    options = {**under("asha"), "CONCURRENT": None, "NUM_SAMPLES": 3}
    run = sweep(tmp_path, options, **{"SCALE.NUM_WORKERS": 2, "OPTIMIZATION.NUM_EPOCHS": 2})
    with ray_nodes() as nodes:
        nodes.add()
        started(run, "--address", nodes.address).ended(0)
    view = view_of(ledger(run))
    assert view.counts()["done"] + view.counts()["stopped"] == 3
    assert_whole(run, view)


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
    assert ledger(run) == before


def test_a_sweep_that_cannot_be_is_refused_before_anything_starts(tmp_path: Path, ray_address: str) -> None:
    run = sweep(tmp_path)
    with pytest.raises(ConfigError, match=r"TUNE\.METRIC is 'beauty', which Exact does not give; it gives accuracy"):
        swept(run, "TUNE.METRIC", "beauty")
    with pytest.raises(PreflightError, match=r"TUNE\.CONCURRENT is 9, but this cluster can hold only 8 trials"):
        swept(run, "TUNE.CONCURRENT", "9")
    with pytest.raises(ConfigError, match=r"TUNE\.SPACE is empty"):
        swept(sweep(tmp_path, {"SPACE": {}}))
    assert not ledger(run)
    assert not list(run.run_dir.glob("trial_*"))


@pytest.mark.parametrize(("budget", "raised"), [({"EPOCHS": 5}, "EPOCHS"), ({"SECONDS": 5.0}, "SECONDS")])
def test_a_budget_ends_a_sweep_which_goes_on_with_a_larger_one(
    budget: dict[str, Any], raised: str, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    run = sweep(tmp_path, {"BUDGET": budget})
    if raised == "SECONDS":
        (run.gate / "slow").write_text("0.3")
    began = time.monotonic()
    assert swept(run).status == "spent"
    assert time.monotonic() - began < 20
    assert count(run, "result") < 4 * EPOCHS
    assert count(run, "result") <= 6 or raised == "SECONDS"  # one trial was training beside the one that used it up
    (run.gate / "slow").unlink(missing_ok=True)
    assert swept(run, f"TUNE.BUDGET.{raised}", "1000").status == "finished"
    assert told(run, "trial", "result") == told(undisturbed("none"), "trial", "result")
