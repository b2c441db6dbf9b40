"""What lies in a run folder: its checkpoints, whether they are sound, what a resume would take. Nothing is written."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from raytrain.config.sections import Checkpoint
from raytrain.errors import CheckpointError, PreflightError, ResumeError, StorageError, masked
from raytrain.journal.records import clean, number
from raytrain.keeper import client
from raytrain.storage.checkpoint import Manifest, is_verified, verify_checkpoint
from raytrain.storage.fingerprint import DIGITS
from raytrain.storage.heritage_files import HeritageFile, heritage_files
from raytrain.storage.lock import JOURNAL
from raytrain.storage.paths import parse_temporary
from raytrain.storage.storage import Storage
from raytrain.storage.store import FOLDER, SUPERSEDED, Listed, Store, listed, verified
from raytrain.training.resume import (
    Origin,
    begun_by,
    compare,
    is_complete,
    newest_to_trust,
    or_heritage,
    origin_of,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

ATTEMPTS = 9  # to see a folder in which nothing that is told of goes meanwhile; a run that trains removes old ones
TAKEN = "resume takes this"
NEITHER = "Give a run folder (OUTPUT/<group>/<name of the YAML>/<extra_tag>), or the config of the run with --cfg_file"

Watch = Callable[[list[Listed]], Iterable[Listed]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One checkpoint. state: "ok" (every byte was read), "not checked" (sizes are right), or "damaged: <why>"."""

    name: str
    manifest: Manifest | None
    state: str
    marks: list[str]


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a run folder holds, newest first; `says` in sentences what a resume would take, and why.

    usable: whether a resume has something sound to take, or may begin at step 0
    """

    rows: list[Row]
    says: list[str]
    usable: bool
    metric: str | None

    @property
    def damaged(self) -> list[Row]:
        return [row for row in self.rows if row.state.startswith("damaged")]


def check_run_folder(storage: Storage, of_config: bool = False) -> None:
    """PreflightError, saying what to give in its place, unless this is a run's folder."""
    path = storage.path_of("")
    if any(storage.exists(name) for name in (FOLDER, JOURNAL, "config.yaml")):
        return
    if of_config:
        raise PreflightError(f"{path}: there is nothing yet: this config has not been trained")
    if not storage.exists(""):
        raise PreflightError(f"{path}: there is no such folder. {NEITHER}")
    names = storage.list("")
    inside = [name for name in names if storage.exists(f"{name}/{FOLDER}")]
    if inside:  # first: people keep a .pth beside their runs
        raise PreflightError(f"{path}: this holds several runs. Give one of them: {masked(storage.path_of(inside[0]))}")
    if "manifest.json" in names or any(name.startswith("checkpoint_") or name.endswith(".pth") for name in names):
        raise PreflightError(f"{path}: this lies within a run folder. Give the folder that holds {FOLDER}/")
    raise PreflightError(f"{path}: this is no run folder. {NEITHER}")


def survey(storage: Storage, cfg: Any = None, every_byte: bool = False, watch: Watch = iter) -> Survey:
    """What the run folder holds at one moment, also while a run trains in it.

    cfg:        the run's config, where it is known; else what its newest checkpoint says counts
    every_byte: read all checkpoints in full, not only the one that a resume would take
    watch:      what those that are read go through, to show how far it is
    """
    states: dict[str, str] = {}
    for _ in range(ATTEMPTS):
        entries = listed(storage)
        store = Store(storage, cfg.CHECKPOINT if cfg is not None else policy_of(entries), "")
        if every_byte:
            unread = [entry for entry in entries if entry.manifest is not None and entry.name not in states]
            states |= {entry.name: state_of(storage, entry) for entry in watch(unread)}
        result = _survey(store, entries, states, cfg)
        if all(storage.exists(f"{FOLDER}/{row.name}") for row in (result.damaged if result.usable else result.rows)):
            break
    return result


def policy_of(entries: list[Listed]) -> Checkpoint:
    """The CHECKPOINT section of the newest checkpoint that holds one, by which the best one is told."""
    for entry in entries:
        if entry.manifest is not None:
            try:
                return Checkpoint.model_validate(entry.manifest.config.get("CHECKPOINT"))
            except ValueError:  # of another version, or made by others
                continue
    return Checkpoint()


def state_of(storage: Storage, entry: Listed) -> str:
    """ "ok", after every byte has been read, or "damaged: <why>"."""
    try:
        verified(storage, entry.name)
    except CheckpointError as error:
        return damaged(storage, entry.name, str(error))
    return "ok"


def damaged(storage: Storage, name: str, why: str) -> str:
    return f"damaged: {why.removeprefix(masked(storage.path_of(f'{FOLDER}/{name}')) + ': ')}"


def _survey(store: Store, entries: list[Listed], states: dict[str, str], cfg: Any) -> Survey:
    storage, refusal = store.storage, ""
    left, recovered = leftovers(storage)
    taken, passed_over = newest_to_trust(store)
    heritage = heritage_files(storage, FOLDER)
    states = states | {name: damaged(storage, name, why) for name, why in passed_over}
    try:
        origin = or_heritage(heritage, origin_of(taken, passed_over))
    except CheckpointError as error:
        origin, refusal = None, str(error)
    if recovered and (origin is None or origin.manifest is None or recovered[1] > origin.manifest.progress):
        says = [f"resume goes on from {recovered[0]}, which a writer that died had finished: the next start renames it"]
        says += origin.notes if origin else refusal.splitlines()[1:-1]
        origin, refusal = None, ""
    elif refusal:
        says = ["nothing can be trusted: " + refusal]
    else:
        says = origin_says(origin, cfg)
    for name in storage.list(FOLDER):  # said once in a line is enough
        says = [line.replace(f"{masked(storage.path_of(f'{FOLDER}/{name}'))}: ", f"{name}: ") for line in says]
        says = [line.replace(f"{name}: {name}: ", f"{name}: ") for line in says]
    if origin is not None and origin.name is not None:
        states = states | {origin.name: "ok"}
    rows = [*rows_of(store, entries, states, origin.name if origin else None), *heritage_rows(heritage, origin)]
    says += in_memory(storage, entries)
    return Survey(rows, [*says, *left, *superseded(storage)], not refusal, store.policy.METRIC)


def in_memory(storage: Storage, entries: list[Listed]) -> list[str]:
    """What the keeper of this host holds, if that is newer than every checkpoint."""
    held = client.newest_progress(storage.path_of(""))
    if held is None or any(e.manifest and e.manifest.progress >= held for e in entries):
        return []
    return [f"in memory on this host: the state after step {held.step}; it is saved when the run ends, however it ends"]


def rows_of(store: Store, entries: list[Listed], states: dict[str, str], taken: str | None) -> list[Row]:
    rows = []
    conditions = {e.name: damaged(store.storage, e.name, e.damage) for e in entries if e.manifest is None}
    conditions = {**{entry.name: "not checked" for entry in entries}, **states, **conditions}
    best = [entry.name for entry in store.ranked(entries) if not conditions[entry.name].startswith("damaged")][:1]
    newest = [entry.name for entry in entries if not conditions[entry.name].startswith("damaged")][:1]
    for entry in entries:
        marks = {"newest": newest, "best": best, TAKEN: [taken] if taken else []}
        here = [mark for mark, names in marks.items() if entry.name in names]
        rows.append(Row(entry.name, entry.manifest, conditions[entry.name], here))
    return rows


def heritage_rows(files: Sequence[HeritageFile], origin: Origin | None) -> list[Row]:
    """OpenPCDet's files, which have no manifest."""
    return [
        Row(
            file.name,
            None,
            f"damaged: {file.damage}" if file.damage else f"OpenPCDet's, epoch {file.epoch}, iteration {file.step}",
            [TAKEN] if origin is not None and origin.path == file.path else [],
        )
        for file in files
    ]


def origin_says(origin: Origin | None, cfg: Any) -> list[str]:
    """What a start would do, and what it passes over on the way there."""
    if origin is None:
        return ["there is no checkpoint yet: training begins at step 0"]
    if origin.manifest is None:  # OpenPCDet's
        return origin.notes
    progress = origin.manifest.progress
    optimization = origin.manifest.config.get("OPTIMIZATION") or {}
    num_epochs = cfg.OPTIMIZATION.NUM_EPOCHS if cfg is not None else optimization.get("NUM_EPOCHS", 0)
    if isinstance(num_epochs, int) and 0 < num_epochs <= progress.epoch:
        if is_complete(origin, num_epochs):
            first = f"nothing is left to do: {origin.name} has all {num_epochs} epochs, trained and evaluated"
        else:
            first = f"resume takes {origin.name}, evaluates it, and is done: all {num_epochs} epochs are trained"
    else:
        first = f"resume goes on from {origin.name} ({place(origin.manifest)}), the newest that is whole"
    return [*differences(origin, cfg), first, *origin.notes]


def differences(origin: Origin, cfg: Any) -> list[str]:
    """What a start under `cfg` would say of this checkpoint, or that it would refuse it, before it goes on."""
    if cfg is None or origin.manifest is None:
        return []
    config = cfg.to_tree()
    if config["SCALE"]["VIRTUAL_WORKERS"] is None:
        config["SCALE"]["VIRTUAL_WORKERS"] = origin.manifest.world["virtual_workers"]
    try:
        return [*compare(origin.manifest, config, False, origin.path), *begun_by(origin, cfg.CFG_FILE)]
    except ResumeError as error:
        return [f"a resume is refused: {error}", *begun_by(origin, cfg.CFG_FILE)]


def place(manifest: Manifest) -> str:
    """`epoch 3, 120 of 1,438 samples`, or `after epoch 2`."""
    progress, samples = manifest.progress, manifest.world.get("num_samples")
    if progress.cursor == 0:
        return f"after epoch {progress.epoch}"
    of = f" of {samples:,}" if isinstance(samples, int) else ""
    return f"epoch {progress.epoch + 1}, {progress.cursor:,}{of} samples"


def leftovers(storage: Storage) -> tuple[list[str], tuple[str, Any] | None]:
    """A line for each unfinished save; and path and progress of the newest that the next start puts in place.

    As Store.clean_leftovers will treat them.
    """
    lines, recovered = [], None
    for name in storage.list(FOLDER):
        left = parse_temporary(name)
        if left is None or left.kind != "writing":
            continue
        path = f"{FOLDER}/{name}"
        if left.writer_lives:
            lines.append(f"{left.name} is being saved now ({name})")
            continue
        verified = None
        with contextlib.suppress(CheckpointError):
            if left.name.startswith("checkpoint_"):
                verified = (left.name, verify_checkpoint(storage, path).progress)
        if verified is None or is_verified(storage, f"{FOLDER}/{left.name}"):
            lines.append(f"leftover: {name}, of a save that no process here is at; the next start removes it")
        else:
            lines.append(f"leftover: {name} holds the whole of {left.name}; the next start puts it in its place")
            recovered = max(recovered or verified, verified, key=lambda pair: pair[1])
    return lines, recovered


def superseded(storage: Storage) -> list[str]:
    """A line for each launch that went back to an older checkpoint, on those that it moved aside."""
    lines = []
    for launch in storage.list(SUPERSEDED):
        with contextlib.suppress(StorageError):  # a file, which no launch has put there
            names = ", ".join(storage.list(f"{SUPERSEDED}/{launch}"))
            lines.append(
                f"superseded: {names} (moved aside by launch {launch}, which went back; kept in {SUPERSEDED} until "
                "you remove them)"
            )
    return lines


def report(shown: Survey, now: float) -> list[RenderableType]:
    """The table and the sentences, to be printed. now: unix seconds."""
    from rich.table import Table
    from rich.text import Text

    sentences: list[RenderableType] = [Text(clean(line)) for line in shown.says]
    if not shown.rows:
        return sentences
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in (
        "checkpoint",
        "epoch",
        "step",
        "samples",
        "saved",
        "size",
        "metrics",
        "weights",
        "launch",
        "state",
        "",
    ):
        right = title in ("epoch", "step", "samples", "size")
        table.add_column(title, justify="right" if right else "left", overflow="fold", no_wrap=title == "checkpoint")
    for row in shown.rows:
        style = "red" if row in shown.damaged else "green" if TAKEN in row.marks else ""
        table.add_row(*(Text(clean(cell)) for cell in cells(row, shown.metric, now)), style=style)
    return [table, Text(), *sentences]


def cells(row: Row, metric: str | None, now: float) -> list[str]:
    """What the table says of one checkpoint."""
    marks = ", ".join(row.marks)
    if row.manifest is None:
        return [row.name, *[""] * 8, row.state, marks]
    manifest, progress = row.manifest, row.manifest.progress
    metrics = manifest.metrics_with_nan
    shown = {metric: metrics[metric]} if metric in metrics else dict(list(metrics.items())[:1])
    return [
        row.name,
        f"{progress.epoch:,}",
        f"{progress.step:,}",
        f"{progress.cursor:,}",
        saved_at(manifest.created, now),
        size(sum(facts["size_bytes"] for facts in manifest.files.values())),
        "  ".join(f"{name} {number(value)}" for name, value in shown.items()),
        manifest.weights[:DIGITS],
        manifest.launch,
        row.state,
        marks,
    ]


def saved_at(created: str, now: float) -> str:
    """`11-23 17:40:02 (3 min ago)`, in local time; as it was written where it is no time."""
    try:
        moment = datetime.datetime.fromisoformat(created).astimezone()
    except (ValueError, OverflowError):
        return created
    return f"{moment:%m-%d %H:%M:%S} ({age(now - moment.timestamp())})"


def age(seconds: float) -> str:
    """`40 s ago`, `3 min ago`, `5 h ago`, `2 d ago`."""
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    unit_s, unit = next((pair for pair in units if seconds >= 2 * pair[0]), units[-1])
    return f"{max(0, int(seconds / unit_s))} {unit} ago"


def size(size_bytes: float) -> str:
    """`412 B`, `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.3g} TB"


def rendered(shown: Survey, console: Console, now: float) -> str:
    """The survey as text, in colours where the console has them. now: unix seconds."""
    with console.capture() as captured:
        for part in report(shown, now):
            console.print(part, soft_wrap=not console.is_terminal)
    return captured.get().rstrip("\n")


def shown_on(console: Console) -> Watch:
    """A `watch` that shows on a terminal how far the reading is."""
    from rich.progress import track

    def watch(entries: list[Listed]) -> Iterable[Listed]:
        return track(entries, "reading", console=console, transient=True, disable=not console.is_terminal)

    return watch
