"""The first and the last that a run's journal says of a launch: what starts, and how it ended."""

from __future__ import annotations

import contextlib
import time

from raytrain.config.load import dump_config
from raytrain.engine.state import RunState
from raytrain.journal.heritage_log import header_lines, model_lines
from raytrain.journal.journal import Journal
from raytrain.journal.run_folder import RunFolder
from raytrain.journal.sinks import JsonlSink
from raytrain.storage.lock import JOURNAL
from raytrain.storage.store import Store
from raytrain.training.control import Control, Restart
from raytrain.training.job import Job
from raytrain.training.resume import Origin

LOCK_S = 2.0  # the workers of a launch that has failed are gone by then


def open_journal(
    folder: RunFolder, run: RunState, job: Job, control: Control, origin: Origin | None, notes: list[str]
) -> tuple[Journal, Restart | None]:
    """The run's journal, with what starts written down, and the restart that has led here, if it was one.

    On ranks other than 0 the journal goes nowhere. A change of the number of workers that was planned is told with
    the first step alone, since only then its cost is known.
    """
    if not run.world.is_first:
        return Journal([], job.cfg.LOG), None
    tag = "/".join(filter(None, [job.cfg.EXP_GROUP_PATH, f"{job.cfg.TAG}({job.cfg.EXTRA_TAG})"]))
    log = folder.log_sink(time.time())
    total_batch = run.plan.batch_size * run.plan.virtual_workers if run.plan.virtual_workers > 1 else None
    for text in [*header_lines(job.arguments, run.config, total_batch), *model_lines(run.model), *notes]:
        log.text(text)
    folder.describe(dump_config(job.cfg), job.arguments)
    journal = Journal([*folder.sinks(), log, control], job.cfg.LOG)
    restart, scale = control.take_restart(run.world.size), job.cfg.SCALE
    if restart is not None and not (restart.is_planned and is_resize(restart, run.world.size)):
        journal.write("event", event="restart", message=restart_message(restart.why, run.progress.step))
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
        exact=run.engine.is_exact or run.plan.virtual_workers == 1,
        num_workers=run.world.size if run.world.size > 1 or control.in_a_worker else 0,
        **({"min_workers": scale.MIN_WORKERS, "max_workers": scale.NUM_WORKERS} if scale.is_elastic else {}),
        device=run.world.device.type,
        param_count=sum(p.numel() for p in run.model.parameters()),
    )
    for note in notes:
        journal.write("event", event="note", message=note)
    return journal, restart


def is_resize(restart: Restart, num_workers: int) -> bool:
    """Whether there are other than so many workers since."""
    return restart.num_workers not in (None, num_workers) and restart.stopped_at is not None


def write_resize(journal: Journal, restart: Restart, num_workers: int, now: float) -> None:
    """Tell, with the first step of these `num_workers`, what the change of their number has cost."""
    assert restart.num_workers is not None and restart.stopped_at is not None, "is_resize"
    seconds = now - restart.stopped_at
    counts = {"from": restart.num_workers, "to": num_workers}
    journal.write(
        "event",
        event="resize",
        **counts,
        why=restart.why,
        planned=restart.is_planned,
        seconds=seconds,
        message=f"{restart.num_workers} -> {num_workers} workers: {restart.why or 'nobody knows why'}; "
        f"{seconds:.1f} s from the last step of those to the first of these",
    )


def restart_message(why: str, step: int) -> str:
    """For people. why: "" where nobody knows.   step: after which the run goes on"""
    where = f"go on after step {step}" if step else "begin anew"
    return "; ".join(filter(None, [why, f"the workers were started again and {where}"]))


def write_failure(run_uri: str, message: str) -> None:
    """The journal of a run that has begun tells why its launch failed. None of its processes has it open any more."""
    folder = RunFolder(run_uri)
    if not folder.storage.exists(JOURNAL):
        return
    with contextlib.closing(folder), folder.locked(LOCK_S):
        sink = JsonlSink(folder.local / JOURNAL)
        sink.write({"kind": "event", "time": time.time(), "event": "failure", "message": message})
        sink.flush()
        sink.close()


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
        weights=newest[0].manifest.weights or None if newest and newest[0].manifest else None,
        best_checkpoint=best.name if best else None,
        pictures=pictures,
        run_dir=store.storage.path_of(""),
        seconds=seconds,
    )
