"""What is looked at on the driver before any worker starts: options, the run folder, where the run goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from raytrain.config.load import with_overrides
from raytrain.config.sections import Config
from raytrain.errors import ConfigError, PreflightError, ResumeError, masked
from raytrain.journal.run_folder import check_writable, run_dir_of
from raytrain.keeper import client
from raytrain.progress import Progress
from raytrain.storage import processes
from raytrain.storage.heritage_files import heritage_files
from raytrain.storage.lock import locked, refuse_links
from raytrain.storage.paths import expanded
from raytrain.storage.storage import open_storage
from raytrain.storage.store import FOLDER, Store, listed
from raytrain.training.environment import Environment, environment_of
from raytrain.training.job import Job
from raytrain.training.resume import Origin, begun_by, choose, compare, is_complete
from raytrain.training.source import source_notes, source_of

ANSWER_S = 3.0  # whoever has just typed the command shall learn at once that the storage does not answer
BEREAVED_S = 15.0  # so long the other workers of a run whose first has died may take to die
LAUNCH = re.compile(r"([0-9]{8})-([0-9]{6})-([0-9a-f]{6})")
LEFTOVERS = ("journal.jsonl", "tensorboard", "eval", "logs", "config.yaml", "environment.json")


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """What a launch is told beside the config: see `raytrain train --help`.

    batch_size: of a step over all virtual workers, in place of BATCH_SIZE_PER_GPU
    dashboard:  whether a cluster that is started for the run serves Ray's
    datasets:   gives the data sets, in place of the task; for a run in this process
    environment: what workers get and are compared with, if it is not this process's
    share:      how many workers an elastic trial of a sweep may have now
    """

    address: str | None = None
    resume: str = "auto"
    overwrite: bool = False
    allow_config_change: bool = False
    pretrained_model: str | None = None
    allow_partial: bool = False
    batch_size: int | None = None
    dashboard: bool = False
    datasets: Callable[[], dict[str, Any]] | None = None
    environment: Environment | None = None
    share: Callable[[], int] | None = None
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a launch begins: its run folder, and the checkpoint that it goes on from.

    changes: of a run that is complete, how config and code differ from those it was trained with, a line each
    notes:   what else a user should know of it, as that another YAML file's run lies there
    """

    cfg: Config
    options: LaunchOptions
    run_dir: str
    store: Store
    origin: Origin | None
    changes: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether the run has finished before, and this launch leaves it at that."""
        return self.options.resume == "auto" and is_complete(self.origin, self.cfg.OPTIMIZATION.NUM_EPOCHS)

    @property
    def virtual_workers(self) -> int | None:
        """Of this run, if that is decided."""
        if self.origin and self.origin.manifest and self.cfg.SCALE.VIRTUAL_WORKERS is None:
            return int(self.origin.manifest.world["virtual_workers"])
        return self.cfg.SCALE.VIRTUAL_WORKERS

    def settled(self, num_workers: int) -> Config:
        """The config, with all that it left open. num_workers: the most, of an elastic run"""
        options, cfg = self.options, self.cfg
        virtual_workers = self.virtual_workers or max(1, num_workers)
        if num_workers > virtual_workers:
            raise ConfigError(
                f"SCALE.NUM_WORKERS is {num_workers}, but this run has {virtual_workers} virtual worker"
                f"{'s' if virtual_workers > 1 else ''} and each worker process needs at least one; "
                f"use --num_workers {virtual_workers} at most, or start a new run (--extra_tag NAME)"
            )
        words = ["SCALE.NUM_WORKERS", str(num_workers), "SCALE.VIRTUAL_WORKERS", str(virtual_workers)]
        if cfg.SCALE.MIN_WORKERS is not None and num_workers < cfg.SCALE.MIN_WORKERS:  # to compare the rest, say
            words += ["SCALE.MIN_WORKERS", "null"]
        if options.batch_size is not None:
            if options.batch_size % virtual_workers:
                raise ConfigError(
                    f"--batch_size {options.batch_size} is the total over all virtual workers, "
                    f"and {virtual_workers} of them do not divide it; give a multiple of {virtual_workers}"
                )
            words += ["OPTIMIZATION.BATCH_SIZE_PER_GPU", str(options.batch_size // virtual_workers)]
        if masked(cfg.OUTPUT) != cfg.OUTPUT:  # from here on it is only written down: what is opened is run_uri
            words += ["OUTPUT", masked(cfg.OUTPUT)]
        return with_overrides(cfg, words)

    def differences(self, cfg: Config) -> list[str]:
        """How `cfg` differs from the checkpoint's, as `compare` tells and refuses it; with the notes, if refused."""
        if self.origin is None or self.origin.manifest is None:
            return []
        try:
            return compare(self.origin.manifest, cfg.to_tree(), self.options.allow_config_change, self.origin.path)
        except ResumeError as error:
            raise ResumeError("\n".join([str(error), *(f"note: {note}" for note in self.notes)])) from None

    def compared(self) -> Start:
        """This, of a run that is complete, with what differs; refused as a resume is that would corrupt the run."""
        options, origin = self.options, self.origin
        assert origin is not None and origin.manifest is not None  # by which it is complete
        changes = self.differences(self.settled(0))
        scale, virtual_workers = self.cfg.SCALE, origin.manifest.world["virtual_workers"]
        if scale.VIRTUAL_WORKERS is None and (scale.NUM_WORKERS or 0) > virtual_workers:
            changes.append(
                f"this run was begun with {virtual_workers} virtual worker{'s' * (virtual_workers > 1)} and "
                f"keeps that; a new one of {scale.NUM_WORKERS} workers has {scale.NUM_WORKERS} (SCALE.VIRTUAL_WORKERS)"
            )
        changes += source_notes(origin.manifest.source, source_of(self.cfg.TASK))
        notes = [*origin.notes, *self.notes]
        if options.pretrained_model is not None:
            notes.append(f"--pretrained_model {options.pretrained_model} is not used: the run is complete")
        return dataclasses.replace(self, changes=changes, notes=notes)

    def job(self, num_workers: int, use_gpu: bool) -> Job:
        """What every worker is asked to do; all that the config left open is settled in its config.

        ResumeError if the run cannot go on under that.
        """
        options, cfg = self.options, self.settled(num_workers)
        self.differences(cfg)
        return Job(
            cfg=cfg,
            run_uri=self.run_dir,
            launch=self.store.launch,
            use_gpu=use_gpu,
            virtual_workers=cfg.SCALE.VIRTUAL_WORKERS or 1,
            start="fresh" if options.resume == "never" else options.resume,
            allow_config_change=options.allow_config_change,
            pretrained_model=options.pretrained_model,
            allow_partial=options.allow_partial,
            arguments=options.arguments,
            notes=self.notes,
            cwd=str(Path.cwd()),
            search_path=search_path(),
            driver=driver(),
            environment=options.environment or environment_of(cfg),
        )


def search_path() -> tuple[str, ...]:
    """Where this process imports from."""
    return tuple(str(Path(path).absolute()) for path in sys.path)


def driver() -> tuple[Any, ...]:
    """What keeps a run going: this process, or the torchrun that has started it. Host, pid, start of the process.

    One that dies meanwhile is told as one that is dead: with a start that no process has.
    """
    pid = os.getpid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        pid = os.getppid()
        while processes.is_of_torchrun(pid):  # a script that torchrun starts, and that has started this command
            pid = processes.parent_of(pid)
    started = processes.started_at(pid)
    if started is None and processes.started_at(os.getpid()) is not None:  # else there is no /proc to tell
        started = "gone"
    return processes.host(), pid, started


def launch_after(before: Iterable[str]) -> str:
    """A name for this launch, behind all those `before`: also where the clock is now, or here, behind theirs.

    Where torchrun has started the workers of a launch again, it is the name that this launch has saved under.
    """
    agent = hashlib.sha256(repr(driver()).encode()).hexdigest() if "TORCHELASTIC_RUN_ID" in os.environ else ""
    token, second = agent[:6] or secrets.token_hex(3), int(time.strftime("%Y%m%d%H%M%S"))
    for name in before:
        if made := LAUNCH.fullmatch(name):
            if made[3] == token:
                return name
            second = max(second, int(made[1] + made[2]) + 1)
    return f"{second // 10**6:08d}-{second % 10**6:06d}-{token}"


def find_start(cfg: Config, options: LaunchOptions, tell: Callable[[str], None] = lambda text: None) -> Start:
    """Where a launch begins; errors of the run folder, of --resume and of its checkpoints come here, in seconds.

    tell: see locked
    """
    if options.overwrite and options.resume != "never":
        raise ConfigError("--overwrite starts over in a run folder that is not empty: it goes with --resume never")
    if options.address not in (None, "local") and cfg.SCALE.NUM_WORKERS == 0:
        raise ConfigError(
            f"--address {options.address} joins a Ray cluster, but with SCALE.NUM_WORKERS 0 the run stays in this "
            "process, without Ray; leave one of them out"
        )
    if options.dashboard and (options.address not in (None, "local") or cfg.SCALE.NUM_WORKERS == 0):
        raise ConfigError("--dashboard is Ray's, of a cluster that is started for the run; this run starts none")
    refuse_sync_bn(cfg)
    run_dir = run_dir_of(cfg)
    check_writable(open_storage(run_dir, ANSWER_S))
    client.take_over(run_dir, timeout_s=0)  # what an earlier launch still holds in memory is to be found as well
    storage = open_storage(run_dir)
    refuse_links(storage)
    store = Store(
        storage, cfg.CHECKPOINT, launch=launch_after(e.manifest.launch for e in listed(storage) if e.manifest)
    )
    origin = None
    if options.resume != "never":
        with contextlib.suppress(PreflightError), locked(storage, timeout_s=0):  # not of a run that trains, wherever
            store.clean_leftovers()
        origin = choose(store, options.resume)
    before = origin if options.resume != "never" else newest_of(store)
    notes = begun_by(before, cfg.CFG_FILE) if before else []
    weights = options.pretrained_model
    if origin is None and weights is not None and not expanded(weights, "--pretrained_model").is_file():
        raise ResumeError(f"--pretrained_model {weights}: there is no such file; name a .pth file")
    if options.resume == "never":
        # Or the checkpoints of a run that is still training would be moved away under it.
        with locked(storage, tell=tell):
            pass
        client.take_over(run_dir, BEREAVED_S)  # one that is just dying saves its state: before, not into the new run
        with locked(storage):
            store.clean_leftovers()  # of the old run: the new one would take what its writer has finished for its own
            start_over(store, options.overwrite, notes)
    start = Start(cfg, options, run_dir, store, origin, notes=notes)
    return start.compared() if start.is_complete else start


def refuse_sync_bn(cfg: Config) -> None:
    """ConfigError if an elastic run has it."""
    if cfg.SCALE.is_elastic and cfg.OPTIMIZATION.SYNC_BN:
        raise ConfigError(
            "OPTIMIZATION.SYNC_BN needs one worker process for each virtual worker, so the number of them cannot "
            "change; leave out SCALE.MIN_WORKERS (or --num_workers MIN-MAX), or SYNC_BN"
        )


def newest_of(store: Store) -> Origin | None:
    """The newest checkpoint that may be whole, as an origin; to know whose it is."""
    newest = next((entry for entry in store.listed() if entry.manifest), None)
    return Origin("", newest.name, newest.manifest, []) if newest else None


def start_over(store: Store, overwrite: bool, notes: list[str]) -> None:
    """An empty run folder; refused where it holds a run, unless that shall be overwritten. notes: of that run

    Its checkpoints are moved aside, to ckpt/superseded: only the user deletes the only copy.
    """
    storage = store.storage
    heritage = [file.name for file in heritage_files(storage, FOLDER)]  # in an object store none is ever taken
    remains = [n for n in storage.list("") if n in LEFTOVERS] + [e.name for e in store.listed()] + heritage
    if not remains:
        return
    if not overwrite:
        raise ResumeError(
            f"--resume never: {storage.path_of('')} holds a run already ({', '.join(remains[:4])}, ...). "
            "Give this one a folder of its own (--extra_tag NAME), or add --overwrite"
            + "".join(f"\nnote: {note}" for note in notes)
        )
    store.supersede(Progress(-1), heritage if "://" not in storage.path_of("") else ())
    for name in LEFTOVERS:
        storage.remove_tree(name)
