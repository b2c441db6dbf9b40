"""sweep.csv and sweep.html: a sweep for people, in files of its own folder.

The page holds its data, style and script, and asks nothing of any network: its policy forbids all but these two.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import html
import io
import json
import string
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from raytrain.errors import masked
from raytrain.journal.records import eta, number, strict
from raytrain.storage.paths import parent_and_name
from raytrain.storage.storage import Storage
from raytrain.sweep.advice import ClipAdvice, advice_lines, advice_of, clip_advice, quantile, touched
from raytrain.sweep.importance import Factor, by_number, importance, key_facts, scores_of
from raytrain.sweep.view import SweepView, TrialView

CSV, HTML = "sweep.csv", "sweep.html"
PAGE = Path(__file__).parent / "page"
FEW = 10  # trials, of which fewer say little of what matters
MAP_KEYS = ("OPTIMIZATION.LR", "OPTIMIZATION.GRAD_NORM_CLIP")


def write_report(storage: Storage, view: SweepView, best_config: str = "") -> ClipAdvice:
    """Writes sweep.csv and sweep.html into the sweep's folder; the advice in it. best_config: the text of best.yaml"""
    parent, own = parent_and_name(storage.path_of(""))
    name = masked(f"{parent_and_name(parent)[1]}/{own}")
    advice = clip_advice(storage, view)
    storage.write_bytes(CSV, sweep_csv(view).encode())
    storage.write_bytes(HTML, sweep_html(view, advice, name, best_config).encode())
    return advice


def sweep_csv(view: SweepView) -> str:
    """A row for each trial, by number; what is not known is empty. Columns are the same in every sweep of a space."""
    text, keys = io.StringIO(), view.keys
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(
        ["trial", "state", *keys, "epoch", view.metric, f"best_{view.metric}", "best_epoch", "seconds", "why", "error"]
    )
    for trial in by_number(view):
        params = [trial.params.get(key, "") for key in keys]
        last = [trial.best_epoch, round(trial.seconds, 3), trial.why, _last_line(trial)]
        rows.writerow([trial.number, trial.state, *params, trial.epoch, trial.value, trial.best, *last])
    return text.getvalue()


def sweep_html(view: SweepView, advice: ClipAdvice | None = None, name: str = "sweep", best_config: str = "") -> str:
    """The page, whole in itself."""
    style, script, page = ((PAGE / f"sweep.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html"))
    data = page_data(view, advice or advice_of([]), name, best_config)
    return string.Template(page).substitute(
        TITLE=html.escape(name),
        STYLE=style,
        STYLE_HASH=_hash(style),
        SCRIPT=script,
        SCRIPT_HASH=_hash(script),
        DATA=json.dumps(strict(data), allow_nan=False).replace("<", "\\u003c"),
    )


def page_data(view: SweepView, advice: ClipAdvice, name: str, best_config: str) -> dict[str, Any]:
    """What the page's script draws; sweep.js says what each part is for."""
    keys, best = [key_facts(view, key) for key in view.keys], view.best
    factors = importance(view)
    return {
        "name": name,
        "subtitle": _subtitle(view),
        "footer": f"Drawn {time.strftime('%F %T', time.localtime(view.newest.get('time', 0)))} from sweep.jsonl, which "
        "holds every number; sweep.csv has one row for each trial. This page asks nothing of any network.",
        "metric": view.metric,
        "mode": view.mode,
        "num_epochs": view.num_epochs,
        "keys": keys,
        "trials": [_trial(trial, view) for trial in by_number(view)],
        "best": None if best is None else best.number,
        "best_note": _best_note(view),
        "best_config": masked(best_config) or (yaml.safe_dump(best.params, sort_keys=False) if best else ""),
        "tiles": _tiles(view),
        "map": _map_axes(keys, factors),
        "importance": [dataclasses.asdict(factor) for factor in factors],
        "importance_note": _importance_note(view),
        "cost": {"says": _cost_text(view)},
        "clip": _clip(advice),
    }


def _trial(trial: TrialView, view: SweepView) -> dict[str, Any]:
    return {
        "number": trial.number,
        "params": [trial.params.get(key) for key in view.keys],
        "state": trial.state,
        "epoch": trial.epoch,
        "value": trial.value,
        "best": trial.best,
        "best_epoch": trial.best_epoch,
        "curve": [[epoch, value] for epoch, _, value in trial.curve],
        "seconds": trial.seconds,
        "trained": trial.trained,
        "clones": trial.clones,
        "why": trial.why,
        "error": masked(trial.error or "the process died") if trial.state == "failed" else None,
        "error_line": _last_line(trial) or None,
    }


def _last_line(trial: TrialView) -> str:
    """Of a failed trial's error the line that says what happened."""
    if trial.state != "failed":
        return ""
    return masked(((trial.error or "").strip().splitlines() or ["the process died"])[-1])


def _subtitle(view: SweepView) -> str:
    searched = [str(view.launch.get(name)) for name in ("search", "scheduler") if view.launch.get(name)]
    how = f"{' search with '.join(searched)}" if len(searched) == 2 else "".join(searched)
    asked = f"{view.num_samples} trials of at most {view.num_epochs} epochs"
    return ", ".join(filter(None, [how, asked, f"{view.mode} {view.metric}", f"seed {view.launch.get('seed')}"]))


def _best_note(view: SweepView) -> str:
    best = view.best
    if best is None:
        return ""
    return (
        f"Trial {best.number}: {view.metric} {number(best.best)} after epoch {best.best_epoch}. "
        "Train it again with: raytrain train --cfg_file best.yaml"
    )


def _tiles(view: SweepView) -> list[tuple[str, str]]:
    best, counts = view.best, {state: count for state, count in view.counts().items() if count}
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    ended = sum(counts.get(state, 0) for state in ("done", "stopped", "failed"))
    saved, trained = saved_epochs(view), sum(trial.trained for trial in view.trials.values())
    return [
        (number(best.best) if best else "–", f"best {view.metric}" + (f", trial {best.number}" if best else "")),
        (
            f"{ended} of {view.num_samples}",
            f"trials: {states}",
        ),
        (eta(view.elapsed_s()), "elapsed, all launches"),
        (f"{trained:,}", "epochs trained, in all trials"),
        (f"{saved / (saved + trained):.0%}" if saved else "0%", f"saved by stopping: {saved:,} epochs"),
    ]


def saved_epochs(view: SweepView) -> int:
    """Epochs that stopped trials did not train."""
    return sum(max(0, view.num_epochs - t.epoch) for t in view.trials.values() if t.state == "stopped")


def _cost_text(view: SweepView) -> str:
    trials = [trial for trial in view.trials.values() if trial.trained]
    trained, seconds = sum(trial.trained for trial in trials), sum(trial.seconds for trial in trials)
    if not trials:
        return "Nothing has been trained yet."
    pace, saved = seconds / trained, saved_epochs(view)
    spared = f" Stopping saved {saved:,} epochs, about {eta(saved * pace)} of training." if saved else ""
    return f"{trained:,} epochs in {eta(seconds)} of training, {pace:.3g} s an epoch.{spared}"


def _importance_note(view: SweepView) -> str:
    count = len(scores_of(view))
    few = f" From {count} trials this is a hint, no more." if count < FEW else ""
    return (
        "How much of the differences between trials each parameter explains alone. Two trials are compared at the last "
        f"epoch that both reached, so a stopped one is not at a disadvantage.{few}"
    )


def _map_axes(keys: Sequence[dict[str, Any]], factors: Sequence[Factor]) -> list[int] | None:
    """Indices of the two keys of the map: LR and GRAD_NORM_CLIP, else the two numbers that matter most."""
    numeric = [facts["key"] for facts in keys if facts["kind"] == "number"]
    wanted = [key for key in MAP_KEYS if key in numeric]
    wanted += [factor.key for factor in factors if factor.key in numeric and factor.key not in wanted]
    where = [facts["key"] for facts in keys]
    return [where.index(key) for key in wanted[:2]] if len(wanted) > 1 else None


def _clip(advice: ClipAdvice) -> dict[str, Any]:
    taken = advice.taken
    line = [(clip, touched(taken, clip)) for clip in (quantile(taken, q / 100) for q in range(1, 101))] if taken else []
    return {
        "lines": advice_lines(advice),
        "low": advice.low,
        "high": advice.high,
        "line": line if advice.low is not None else [],
        "trials": [{"number": t.number, "clip": t.clip, "touched": t.touched} for t in advice.trials],
    }


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
