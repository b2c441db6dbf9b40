"""One worker process of a run: the one place where its parts are put together.

`run_job` is the same in-process and under Ray Train; a Control tells it what the outside wants.
`train_loop_per_worker` is what Ray Train calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from raytrain.config.load import dump_config
from raytrain.config.sections import Config
from raytrain.data.feed import Feed
from raytrain.engine.determinism import prepare_torch
from raytrain.engine.randomness import seed_all
from raytrain.engine.state import RunState, build_run
from raytrain.engine.world import World
from raytrain.journal.heritage_log import header_lines, model_lines
from raytrain.journal.journal import Journal
from raytrain.journal.run_folder import RunFolder
from raytrain.keeper.checkpointer import Saves
from raytrain.keeper.client import is_possible
from raytrain.keeper.heartbeat import Stacks, Stragglers, watched
from raytrain.keeper.snapshots import Kept, join_keeper, keeper_begun
from raytrain.progress import Plan, Progress
from raytrain.storage.store import Store, checkpoint_name
from raytrain.task import Task, make_task
from raytrain.training import loop
from raytrain.training.contract import check_dataset
from raytrain.training.control import Control
from raytrain.training.job import Job
from raytrain.training.pictures import draw_pictures
from raytrain.training.resume import Origin, bring_to_start


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended: status "finished" or "stopped", and where."""

    status: str
    progress: Progress
    metrics: dict[str, float]
    best: dict[str, Any] | None


def run_job(
    job: Job, world: World, control: Control, datasets_of: Callable[[], dict[str, Any]] | None = None
) -> Outcome:
    """Collective. Build the run, bring it to where it stands, and train it.

    datasets_of: gives the data sets, in place of the task
    """
    cfg = job.cfg
    prepare_torch(cfg, world.device)
    begun = keeper_begun(job.run_uri, job.launch) if world.is_first and is_possible() else None
    control.begin("Making the task")
    seed_all(cfg.SEED, "task")
    task = make_task(cfg)
    control.begin("Building the data sets")
    datasets = datasets_of() if datasets_of else build_datasets(task, cfg.SEED)
    control.begin("Building the model")
    run = build_run(cfg, task, datasets["train"], plan_of(cfg, len(datasets["train"]), world), world)
    planned, channels_last = evaluation_epochs(cfg, datasets), cfg.OPTIMIZATION.CHANNELS_LAST
    feed = Feed(task, datasets, run.plan, world, cfg.LOADER, cfg.SEED, planned, channels_last)
    control.place = lambda: place_of(run, feed)
    with contextlib.ExitStack() as stack:
        folder = RunFolder(job.run_uri)
        stack.callback(folder.close)
        store = Store(folder.storage, cfg.CHECKPOINT, job.launch)
        control.begin("Joining the process that keeps the run's state")
        if begun is not None:
            begun.join()
        kept, told = join_keeper(job.run_uri, job.launch, world)
        run.notes.extend(told)
        if kept is not None:
            stack.callback(kept.close)
            if torch.distributed.is_initialized():  # else nothing would start this process again, or a debugger has it
                watch(run, feed, kept)
        control.place = lambda: place_of(run, feed)
        if world.is_first:
            stack.enter_context(folder.locked())
            store.clean_leftovers()
        saves = Saves(store, kept)
        origin, notes = bring_to_start(run, store, job, kept)
        saves.describe(run, job.driver)
        saves.prepare(run)
        if run.engine.why_ddp is not None:
            notes.append(f"ENGINE ddp, parameter by parameter, instead of flat buffers: {run.engine.why_ddp}")
        if run.unevaluated is not None and not feed.evaluate_after(run.progress.epoch):
            run.unevaluated = None
        journal = open_journal(folder, run, job, control, origin, notes)
        for hang in kept.hangs if kept else ():
            journal.write("event", event="hang", **hang)
        stack.callback(journal.close)
        stack.callback(feed.close)
        if world.broadcast_object(owes_checkpoint(run, store, origin)):
            evaluates = feed.evaluate_after(run.progress.epoch)
            loop.save_checkpoint(run, saves, journal, control, metrics=None if evaluates else {})
            run.unevaluated = checkpoint_name(run.progress) if evaluates else None
        began = time.monotonic()
        done = loop.train_model(run, task, feed, saves, journal, control)
        status, seconds = "finished" if done else "stopped", time.monotonic() - began
        if world.is_first:
            draws = task.has_pictures() and cfg.EVAL.PICTURES > 0 and done and run.predictions
            pictures = draw_pictures(folder, run, task, feed.datasets["val"], journal) if draws else None
            write_end(journal, run, store, status, seconds, pictures)
        if kept is not None and kept.leads:
            kept.end()
        return Outcome(status, run.progress, run.metrics, run.best)


def watch(run: RunState, feed: Feed, kept: Kept) -> None:
    """From now on the keeper kills this process if it stops making progress, and rank 0 looks for stragglers."""
    stacks = Stacks()
    feed.stacks_path = stacks.path
    timeout_s = run.config["SCALE"]["HANG_TIMEOUT"]
    run.pulse = watched(kept.line, kept.board, stacks, run.world.rank, len(run.world.block), timeout_s)
    if run.world.is_first:
        run.stragglers = Stragglers(kept.board, time.monotonic())


def build_datasets(task: Task, seed: int) -> dict[str, Any]:
    """The data sets by split; "val" is left out where the task has none.

    What a task draws at random here (a split of its own) is the same on every process and at
    every resume, and in both splits: else training would see what it is evaluated on.
    """
    seed_all(seed, "datasets")
    datasets = {"train": task.build_dataset("train")}
    check_dataset(datasets["train"], "train", task)
    seed_all(seed, "datasets")
    val = task.build_dataset("val")
    if val is not None:
        check_dataset(val, "val", task)
        datasets["val"] = val
    return datasets


def plan_of(cfg: Config, num_samples: int, world: World) -> Plan:
    """How the data is cut into steps."""
    optim_cfg = cfg.OPTIMIZATION
    return Plan(
        num_samples, optim_cfg.BATCH_SIZE_PER_GPU, world.virtual_workers, optim_cfg.ACCUMULATE, optim_cfg.NUM_EPOCHS
    )


def evaluation_epochs(cfg: Config, datasets: dict[str, Any]) -> Callable[[int], bool]:
    """Whether the validation split is read once that many epochs are finished."""
    every, last = cfg.EVAL.EVERY, cfg.OPTIMIZATION.NUM_EPOCHS
    return lambda epoch: "val" in datasets and (epoch == last or (every is not None and epoch % every == 0))


def owes_checkpoint(run: RunState, store: Store, origin: Origin | None) -> bool:
    """True if the run starts at the end of an epoch whose checkpoint its own folder does not hold yet.

    From a finished run's checkpoint elsewhere, or from memory that was all that was left.
    """
    if origin is None or origin.name is not None or run.progress.cursor > 0:
        return False
    if not origin.is_memory and not run.plan.finished(run.progress):
        return False
    return checkpoint_name(run.progress) not in [entry.name for entry in store.listed()]


def open_journal(
    folder: RunFolder, run: RunState, job: Job, control: Control, origin: Origin | None, notes: list[str]
) -> Journal:
    """The run's journal, with what starts written down; on ranks other than 0 it goes nowhere."""
    if not run.world.is_first:
        return Journal([], job.cfg.LOG)
    tag = "/".join(filter(None, [job.cfg.EXP_GROUP_PATH, f"{job.cfg.TAG}({job.cfg.EXTRA_TAG})"]))
    log = folder.log_sink(time.time())
    total_batch = run.plan.batch_size * run.plan.virtual_workers if run.plan.virtual_workers > 1 else None
    for text in [*header_lines(job.arguments, run.config, total_batch), *model_lines(run.model), *notes]:
        log.text(text)
    folder.describe(dump_config(job.cfg), job.arguments)
    journal = Journal([*folder.sinks(), log, control], job.cfg.LOG)
    journal.run(
        tag=tag,
        launch=job.launch,
        step=run.progress.step,
        epoch=run.progress.epoch,
        resumed_from=origin.path if origin else None,
        steps_per_epoch=run.plan.steps_per_epoch,
        num_epochs=run.plan.num_epochs,
        num_samples=run.plan.num_samples,
        batch_size=run.plan.batch_size,
        accumulate=run.plan.accumulate,
        virtual_workers=run.plan.virtual_workers,
        num_workers=run.world.size if run.world.size > 1 or control.in_a_worker else 0,
        device=run.world.device.type,
        param_count=sum(p.numel() for p in run.model.parameters()),
    )
    for note in notes:
        journal.write("event", event="note", message=note)
    return journal


def write_end(journal: Journal, run: RunState, store: Store, status: str, seconds: float, pictures: str | None) -> None:
    """The last record of a launch: how it ended, and where everything is."""
    newest, best = store.listed(), store.best()
    journal.write(
        "end",
        status=status,
        epoch=run.progress.epoch,
        step=run.progress.step,
        metrics=run.metrics,
        best=run.best["metrics"] if run.best else None,
        checkpoint=newest[0].name if newest else None,
        best_checkpoint=best.name if best else None,
        pictures=pictures,
        run_dir=store.storage.path_of(""),
        seconds=seconds,
    )


def place_of(run: RunState, feed: Feed) -> dict[str, Any]:
    """Where the run stands, for the failure screen: the step under way counts."""
    samples = {"sample_ids": list(feed.current.ids) if feed.current else None}
    if feed.current and feed.current.split == "val":
        return {"what": f"The evaluation after epoch {feed.current.epoch}", **samples}
    return {"epoch": run.progress.epoch, "step": run.progress.step + 1, **samples}
