"""The folder of a sweep and what it has come to: params and results of its trials, also of earlier launches."""

from __future__ import annotations

import time
from typing import Any

from raytrain.config.load import config_diff, dump_config, with_values
from raytrain.config.schema import at
from raytrain.config.sections import BOHB_REMOVED, Config
from raytrain.config.yaml_text import parse_text
from raytrain.errors import ConfigError, ResumeError, masked
from raytrain.journal.run_folder import RunFolder
from raytrain.storage.storage import open_storage
from raytrain.sweep.ledger import Ledger, read_ledger, trial_folder
from raytrain.sweep.lineage import Lineage, Params, lineages_of
from raytrain.sweep.space import workers_of_trial
from raytrain.sweep.view import SweepView, TrialView, view_of
from raytrain.training.source import other_file, source_notes

CONFIG = "sweep.yaml"
BEST = "best.yaml"
# What may be other when a sweep goes on: how much of it, and how fast. All else decides what trials and results mean.
FREE = (
    *("OUTPUT", "CFG_FILE", "SCALE.MAX_FAILURES", "SCALE.HANG_TIMEOUT", "LOG.", "LOADER.WORKERS", "LOADER.PREFETCH"),
    *("SCALE.MIN_WORKERS", "SCALE.GROW_EVERY"),
    *("EVAL.PICTURES", "CHECKPOINT.EVERY_SECONDS", "CHECKPOINT.OVERHEAD", "CHECKPOINT.SNAPSHOT_EVERY"),
    *("TUNE.NUM_SAMPLES", "TUNE.CONCURRENT", "TUNE.BUDGET", "TUNE.MAX_FAILED", "OPTIMIZATION.NUM_EPOCHS"),
)


class Sweep:
    """One launch of a sweep: its ledger is read, and written on.

    lineages:     of each trial, as far as the sweep has come; what this launch goes through again does not set it back
    first_params: by trial, the params it had at first
    """

    def __init__(self, cfg: Config, folder: RunFolder) -> None:
        self.cfg, self.folder, self.began = cfg, folder, time.time()
        records = read_ledger(folder.storage)
        self.view: SweepView = view_of(records)
        self.before: SweepView = view_of(records)
        self.lineages: dict[int, Lineage] = lineages_of(records)
        self.first_params: dict[int, Params] = {
            r["trial"]: r["params"] for r in reversed(records) if r["kind"] == "trial"
        }
        self._replayed = {number: Lineage(params) for number, params in self.first_params.items()}
        self.known = {(r["trial"], r["key"], r["epoch"]): r for r in records if r["kind"] == "result" and "key" in r}
        self.lengths = lengths_of(records)
        self._sources = [r["source"] for r in records if r["kind"] == "sweep" and isinstance(r.get("source"), dict)]
        self.clones = {(r["trial"], r["epoch"], r["from"]) for r in records if r["kind"] == "clone"}
        self._recloned: set[tuple[int, int, int]] = set()
        self.ledger = Ledger(folder)

    def note(self, kind: str, **fields: Any) -> None:
        """One more record, for the ledger and the view."""
        self.view.add(self.ledger.append({"kind": kind, "time": time.time(), **fields}))

    def add_trial(self, number: int, params: Params) -> None:
        """Nothing new where an earlier launch made it."""
        if number not in self.first_params:
            self.first_params[number] = params
            self.lineages[number] = self._replayed[number] = Lineage(params)
            self.note("trial", trial=number, params=params)

    def add_clone(self, number: int, source: int, epoch: int, params: Params) -> Lineage:
        """Trial `number` goes on from what `source` was after `epoch`, with these params; the source's lineage."""
        source_lineage = self._replayed[source]
        lineage = self._replayed[number] = source_lineage.changed(epoch, params)
        self._recloned.add((number, epoch, source))
        if (number, epoch, source) not in self.clones:
            self.clones.add((number, epoch, source))
            self.lineages[number] = lineage
            phases = lineage.config(self.cfg, number).to_tree()["OPTIMIZATION"]["PHASES"]
            self.note("clone", trial=number, epoch=epoch, params=params, config_phases=phases, **{"from": source})
        return source_lineage

    def add_result(self, number: int, result: dict[str, Any]) -> None:
        """One that is known already counts, but is not written down again."""
        place = (number, result["key"], result["epoch"])
        before = {clone for clone in self.clones if clone[0] == number and clone[1] < result["epoch"]}
        if before - self._recloned:
            self._undo_clones(number, result["epoch"])
        measured = {epoch for epoch, _, _ in self.view.trials[number].curve}
        if place not in self.known or result["epoch"] not in measured:  # a damaged ledger may have lost one before it
            fields = {name: result[name] for name in ("epoch", "step", "value", "metrics", "seconds", "key")}
            self.note("result", trial=number, **fields, **({"repeated": True} if place in self.known else {}))
            self.known[place] = self.view.newest

    def _undo_clones(self, number: int, epoch: int) -> None:
        """The trial was once a clone, and is none in this launch: another one failed then, and did not now."""
        lineage = self.lineages[number] = self._replayed[number]
        self.clones = {clone for clone in self.clones if clone[0] != number or clone in self._recloned}
        self.note("trial", trial=number, params=lineage.base)
        phases = lineage.config(self.cfg, number).to_tree()["OPTIMIZATION"]["PHASES"]
        for since, params in lineage.phases:
            self.note("clone", trial=number, epoch=since, params=params, config_phases=phases, **{"from": number})
        for (trial, key, known), record in list(self.known.items()):  # what was known before counts again
            if trial == number and known < epoch and key == lineage.key(known):
                self.note(**{name: record[name] for name in record if name != "time"} | {"repeated": True})

    def earlier_decision(self, number: int, epoch: int) -> str | None:
        """What earlier launches decided for the trial after its result of `epoch`; None where they did not."""
        trial = self.before.trials.get(number)
        if trial is None or epoch > trial.epoch:
            return None
        if trial.state == "stopped" and epoch == trial.epoch:
            return "STOP"
        return "CONTINUE" if epoch < trial.epoch or trial.state == "done" else None

    def is_over(self, number: int) -> bool:
        """Whether earlier launches brought the trial to its end."""
        trial = self.before.trials.get(number)
        if trial is None or trial.state not in ("done", "stopped", "failed"):
            return False
        return trial.state != "done" or trial.epoch >= self.cfg.OPTIMIZATION.NUM_EPOCHS

    def check_length(self) -> None:
        """ResumeError if a trial has more epochs than NUM_EPOCHS: what it came to is nothing a shorter run comes to."""
        now = self.cfg.OPTIMIZATION.NUM_EPOCHS
        reached = max((trial.epoch for trial in self.view.trials.values()), default=0)
        if reached > now:
            raise ResumeError(
                f"{self.folder.storage.path_of('')} holds trials of up to {reached} epochs, and "
                f"OPTIMIZATION.NUM_EPOCHS is {now}. What to do: give as many (--epochs {reached}), or start another "
                "sweep (--extra_tag NAME)"
            )

    def write_config(self) -> None:
        """sweep.yaml: what the trials are drawn from and mean; a later launch is held against it."""
        self.folder.storage.write_bytes(CONFIG, masked(dump_config(self.cfg)).encode())

    def write_best(self) -> Config | None:
        """best.yaml: the config with which `raytrain train` gives the best trial's weights; None without results."""
        best = self.view.best
        if best is None:
            return None
        cfg = best_config(self.cfg, self.lineages[best.number], best)
        self.folder.storage.write_bytes(BEST, masked(dump_config(cfg)).encode())
        return cfg

    def lengthened(self) -> list[str]:
        """A line if the best trial was not a run of NUM_EPOCHS from its start: best.yaml gives other bits then."""
        best, now = self.view.best, self.cfg.OPTIMIZATION.NUM_EPOCHS
        if best is None:
            return []
        before = {length for epoch, length in self.lengths.get(best.number, {}).items() if epoch <= best.epoch}
        if before <= {now}:
            return []
        how = "longer" if min(before) < now else "shorter"
        return [
            f"note: trial {best.number} was begun as a run of {min(before)} epochs and made {how}; {BEST} has the "
            f"schedule of {now} epochs from the start, so it gives other weights than {trial_folder(best.number)} has"
        ]

    def other_source(self, source: dict[str, str]) -> list[str]:
        """A line if earlier launches trained with other code of the task: their results are compared with these."""
        notes = [source_notes(old, source, "an earlier launch's, whose results are kept") for old in self._sources]
        return [f"note: {line}" for line in next(filter(None, notes), [])]

    def close(self) -> None:
        self.ledger.close()


def lengths_of(records: list[dict[str, Any]]) -> dict[int, dict[int, int]]:
    """By trial and epoch, the NUM_EPOCHS of the launch that trained it."""
    lengths: dict[int, dict[int, int]] = {}
    num_epochs = 0
    for record in records:
        if record["kind"] == "sweep":
            num_epochs = record["num_epochs"]
        elif record["kind"] == "result" and not record.get("repeated"):
            lengths.setdefault(record["trial"], {})[record["epoch"]] = num_epochs
    return lengths


def best_config(cfg: Config, lineage: Lineage, best: TrialView) -> Config:
    """The trial's config, to be trained as a run of its own beside the trials."""
    num_workers, virtual_workers = workers_of_trial(cfg)
    scale = {"SCALE.NUM_WORKERS": num_workers, "SCALE.VIRTUAL_WORKERS": virtual_workers}
    of_trial = with_values(lineage.config(cfg, best.number), scale)
    output = open_storage(cfg.OUTPUT).path_of("") if "://" not in cfg.OUTPUT else cfg.OUTPUT  # from any folder
    return of_trial.model_copy(update={"EXTRA_TAG": f"{cfg.EXTRA_TAG}/best", "OUTPUT": output})


def check_same(cfg: Config, folder: RunFolder) -> list[str]:
    """ResumeError if the sweep in this folder was begun with a config under which trials mean something else.

    A line if it was begun by another YAML file.
    """
    if not folder.storage.exists(CONFIG):
        return []
    try:
        old = parse_text(folder.storage.read_bytes(CONFIG).decode(), folder.storage.path_of(CONFIG))
        if not isinstance(old, dict):
            raise ConfigError(f"{folder.storage.path_of(CONFIG)}: this is no config")
    except (ConfigError, UnicodeDecodeError) as error:
        raise ResumeError(
            f"{error}\nWhat to do: put {CONFIG} of this sweep back from a copy, or remove it: the next launch writes "
            "it anew, without a check that its config is the one that the sweep was begun with"
        ) from None
    if at(old, "TUNE.SEARCH") == "bohb":
        raise ResumeError(
            f"{folder.storage.path_of('')} holds a sweep that SEARCH bohb chose the trials of. {BOHB_REMOVED}. "
            "What to do: start another sweep (--extra_tag NAME)"
        )
    order = [list((tree.get("TUNE") or {}).get("SPACE") or {}) for tree in (old, cfg.to_tree())]
    if sorted(order[0]) == sorted(order[1]) and order[0] != order[1]:
        raise ResumeError(
            f"{folder.storage.path_of('')} holds a sweep whose TUNE.SPACE has its keys in another order "
            f"({', '.join(order[0])}), which the trials are drawn in. What to do: put them back in that order"
        )
    different = [(k, a, b) for k, a, b in config_diff(old, cfg.to_tree()) if not k.startswith(FREE)]
    if different:
        raise ResumeError(
            f"{folder.storage.path_of('')} holds a sweep of another config:\n"
            + "\n".join(f"  {k}: was {a}, now {b}" for k, a, b in different)
            + "\nWhat to do: put the old values back, or start another sweep (--extra_tag NAME)"
        )
    return [f"note: {line}" for line in other_file(old.get("CFG_FILE"), cfg.CFG_FILE)]
