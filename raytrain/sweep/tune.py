"""From a Config with a TUNE section to a finished sweep: checks -> Ray Tune with actors that train -> a report."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from typing import Any

from raytrain.cluster import cluster
from raytrain.cluster.local_cluster import is_tested
from raytrain.cluster.mailbox import Mailbox
from raytrain.cluster.resources import check_reachable
from raytrain.config.load import dump_config, with_values
from raytrain.config.sections import Config
from raytrain.errors import ConfigError, ResumeError, TrainingError, explained
from raytrain.journal.run_folder import RunFolder, check_writable, run_dir_of
from raytrain.storage.lock import refuse_links
from raytrain.storage.paths import joined
from raytrain.storage.storage import open_storage
from raytrain.sweep.advice import advice_lines
from raytrain.sweep.ledger import LEDGER
from raytrain.sweep.monitor import ShowSweep, SweepMonitor
from raytrain.sweep.preflight import TaskFacts, inspect_task
from raytrain.sweep.ray_tune import (
    TUNES_FOLDER,
    TrialGenerator,
    actors_as_they_stand,
    fit,
    ray_tune_settings,
)
from raytrain.sweep.report import HTML, write_report
from raytrain.sweep.resources import TrialResources
from raytrain.sweep.search import GridSearch, Search, build_search
from raytrain.sweep.space import objective, sweep_seed
from raytrain.sweep.sweep import BEST, Sweep, check_same
from raytrain.sweep.view import SweepView
from raytrain.task import load_task_class
from raytrain.training.environment import environment_of, told
from raytrain.training.preflight import ANSWER_S, launch_after
from raytrain.training.signals import signals_wish_stop


def show_nothing(view: SweepView, now: float) -> None:
    """Shows nothing."""


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """What a launch of a sweep is told beside the config: see `raytrain tune --help`.

    extend: so many samples (TUNE.NUM_SAMPLES) more than it had
    """

    address: str | None = None
    extend: int = 0


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """How a launch of a sweep ended: "finished", "spent" (its budget) or "stopped" (by a signal); what was trained is
    saved.

    folder: a path or URI.   best: what best.yaml holds, None without results
    advice: lines for people: on clipping, on what best.yaml cannot give, on code that has changed since
    """

    status: str
    folder: str
    view: SweepView
    best: Config | None
    advice: list[str]

    def lines(self) -> list[str]:
        """For a terminal, after the table: where everything is, and what to do next."""
        lines = [*self.advice, f"  sweep folder  {self.folder}"]
        lines.append(f"  the picture   {joined(self.folder, HTML)}")
        if self.best is not None:
            command = "raytrain train --cfg_file " if "://" not in self.folder else ""  # configs are read from disks
            lines.append(f"  the best one  {command}{joined(self.folder, BEST)}")
        if self.status == "stopped":
            lines.append("stopped; the same command goes on")
        if self.status == "spent":
            lines.append("the budget is spent (TUNE.BUDGET); with a larger one the same command goes on")
        return lines


def tune(
    cfg: Config,
    options: SweepOptions | None = None,
    show: ShowSweep | None = None,
    stop: threading.Event | None = None,
    starting_cluster: cluster.Cluster | None = None,
) -> SweepResult:
    """A sweep, begun or gone on with, as `raytrain tune` does it.

    show: gets what it has come to, again and again
    stop: wishes its end, in place of this process's signals.   starting_cluster: the cluster, if it is starting already
    """
    options = options or SweepOptions()
    cfg = with_values(cfg, {**cfg.TUNE.CONSTANTS, "TUNE.CONSTANTS": {}})
    search = checked_search(cfg, options.extend)
    load_task_class(cfg.TASK)
    run_dir = run_dir_of(cfg)
    check_writable(open_storage(run_dir, ANSWER_S), TUNES_FOLDER)
    folder = RunFolder(run_dir, LEDGER)
    refuse_links(folder.storage, LEDGER)
    with contextlib.ExitStack() as stack:
        stack.callback(folder.close)
        stack.enter_context(folder.locked(ANSWER_S))
        stack.callback(folder.storage.remove_tree, TUNES_FOLDER)
        notes = check_same(cfg, folder)
        stop = stop or stack.enter_context(signals_wish_stop())
        used = starting_cluster or stack.enter_context(cluster.starting_for_trials(cfg, options.address))
        with explained("A look at the task, before any trial,", run_dir):
            task = inspect_task(cfg)
        sweep = Sweep(cfg, folder)
        stack.callback(sweep.close)
        sweep.check_length()
        notes += sweep.other_source(task.source)
        used.connect()
        notes += [f"note: {used.note}"] if used.note else []
        if used.is_ours and is_tested():
            stack.enter_context(actors_as_they_stand())
            used.wait_for_workers()
        try:
            status, differing = run_trials(sweep, search, options, task, stop, show or show_nothing)
        except TrainingError:  # too many trials have failed: what the others came to is shown all the same
            reported(sweep)
            raise
        best, advice = reported(sweep)
    return SweepResult(status, run_dir, sweep.view, best, [*advice, *notes, *differing])


def checked_search(cfg: Config, extend: int) -> Search:
    """What chooses the trials; ConfigError where it cannot add as many samples."""
    search = build_search(cfg, sweep_seed(cfg))
    if extend and isinstance(search, GridSearch):
        raise ConfigError(
            f"--extend {extend}: TUNE.SPACE is a grid, which has as many trials as it has points "
            f"({search.points.size}). Leave --extend out, or start another sweep over more values (--extra_tag NAME)"
        )
    return search


def reported(sweep: Sweep) -> tuple[Config | None, list[str]]:
    """best.yaml and the report are written; what best.yaml holds, and lines for people."""
    best = sweep.write_best()
    advice = write_report(sweep.folder.storage, sweep.view, dump_config(best) if best is not None else "")
    if best is None:
        return None, [f"no trial has a finite {sweep.view.metric}, so there is no {BEST}"]
    return best, [*advice_lines(advice), *sweep.lengthened()]


def run_trials(
    sweep: Sweep, search: Search, options: SweepOptions, task: TaskFacts, stop: threading.Event, show: ShowSweep
) -> tuple[str, list[str]]:
    """The trials that are left, on the cluster that this process is connected to; how it ended, and what to know."""
    cfg, resources = sweep.cfg, TrialResources.of(sweep.cfg)
    check_reachable(sweep.folder.storage.path_of(""))
    launch = launch_after(())
    samples = number_of_samples(sweep, options)
    trials = TrialGenerator(sweep, search, search.num_trials(samples), resources.concurrent)
    sweep.write_config()
    sweep.note(
        "sweep", extend=options.extend, **facts(cfg, samples, trials.total, resources.concurrent), source=task.source
    )
    mailbox, environment = Mailbox(launch), environment_of(cfg)
    monitor = SweepMonitor(sweep, trials, stop, mailbox, show)
    try:
        if stop.is_set():
            monitor.stop_all()
        else:
            with ray_tune_settings():
                fit(sweep, trials, monitor, launch, resources, task, environment)
        notes = told(environment, dict.fromkeys(mailbox.get("environment") or (), "trials"))
    finally:
        mailbox.clear()
    status = {"": "finished", "budget": "spent"}.get(monitor.why, "stopped")
    best = sweep.view.best
    sweep.note(
        "end", status=status, best=best and best.number, value=best and best.best, seconds=time.time() - sweep.began
    )
    show(sweep.view, time.time())
    if monitor.failure is not None:
        raise monitor.failure
    return status, [f"note: {note}" for note in notes]


def number_of_samples(sweep: Sweep, options: SweepOptions) -> int:
    """TUNE.NUM_SAMPLES, or those of earlier launches if that was more; and what this one adds."""
    before, scheduler = int(sweep.view.launch.get("samples", 0)), sweep.cfg.TUNE.SCHEDULER
    added = options.extend
    if (sweep.view.end or {}).get("status") != "finished" and sweep.view.launch.get("extend") == added:
        added = 0  # the launch before was to add them, and did not come to its end
    samples = max(sweep.cfg.TUNE.NUM_SAMPLES, before) + added
    if 0 < before < samples and scheduler in ("pbt", "pb2"):
        raise ResumeError(
            f"{sweep.folder.storage.path_of('')} holds a population of {before}, and {samples} are asked for; under "
            f"{scheduler} each generation is compared as a whole, so with more its clones would have been others. "
            "Leave --extend out, or start another sweep (--extra_tag NAME)"
        )
    return samples


def facts(cfg: Config, samples: int, total: int, concurrent: int) -> dict[str, Any]:
    """What the ledger says of a launch."""
    tune_cfg, (metric, mode) = cfg.to_tree()["TUNE"], objective(cfg)
    return {
        "scheduler": cfg.TUNE.SCHEDULER,
        "search": cfg.TUNE.SEARCH,
        "metric": metric,
        "mode": mode,
        "samples": samples,
        "num_samples": total,  # trials: grids multiply them
        "seed": sweep_seed(cfg),
        "num_epochs": cfg.OPTIMIZATION.NUM_EPOCHS,
        "space": tune_cfg["SPACE"],
        "concurrent": concurrent,
    }
