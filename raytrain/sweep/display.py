"""What a person sees of a sweep: one live table on a terminal, a line for what matters elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raytrain.errors import masked
from raytrain.journal.display import discard_output
from raytrain.journal.records import clean, eta, number
from raytrain.sweep.view import SweepView, TrialView, short_names

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

REDRAW_S = 0.2
WIDE = 240  # columns, where output is no terminal: a file or a pipe has room for all that is swept
ROWS_AT_THE_END = 30
BEST_KEPT = 3  # rows that a short screen keeps before those of trials that run
FINAL = ("done", "stopped", "failed")
STYLES = {"running": "cyan", "done": "green", "stopped": "dim", "failed": "red", "waiting": "dim"}
ERROR_LENGTH = 200


class SweepDisplay:
    """Shows a sweep's view as it changes; see sweep/view.py."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self._console = console or Console()
        self._in_place = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live: Live | None = None
        self._printed: dict[int, str] = {}  # the state of each trial that was printed last
        self._best: float | None = None
        self._drawn_at = float("-inf")
        self._is_broken = False

    def show(self, view: SweepView, now: float) -> None:
        """Shows what has changed. Cheap: call it with each record, and once a second. now: unix seconds

        The sweep goes on where nothing can be shown any more: `raytrain tune | head`, a full disk.
        """
        self._guarded(self._show, view, now)

    def close(self, view: SweepView, now: float) -> None:
        """Takes the live table away and prints the last one, the best first."""
        self._guarded(self._close, view, now)

    def leave(self) -> None:
        """Takes the live table away and leaves the terminal as it was: before an error is told."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _guarded(self, act: Any, *what: Any) -> None:
        if self._is_broken:
            return
        try:
            act(*what)
        except (OSError, SystemExit):  # rich ends the process where a pipe is broken
            self._is_broken = True
            discard_output(self._console)

    def _show(self, view: SweepView, now: float) -> None:
        for line in self._new_lines(view):
            self._print(line)
        if self._in_place and abs(now - self._drawn_at) >= REDRAW_S:
            self._drawn_at = now
            self._draw(view, now)

    def _new_lines(self, view: SweepView) -> list[str]:
        """Lines on what is new: on a terminal only failures, the table tells the rest.

        At first only failures too: the others have ended in earlier launches.
        """
        lines, only_failures = [], self._in_place or not self._printed
        for trial in view.trials.values():
            if trial.state in FINAL and self._printed.get(trial.number) != trial.state:
                lines += [trial_text(trial, view)] if trial.state == "failed" or not only_failures else []
            self._printed[trial.number] = trial.state
        best = view.best
        if best is not None and view.better(best.best, self._best):
            self._best = best.best
            lines += [] if self._in_place else [f"best so far: {best_text(view)}"]
        return lines

    def _draw(self, view: SweepView, now: float) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.text import Text

        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop")
            self._live.start()
        room = max(1, self._console.height - 4)  # headline, titles, what is left out, the cursor's line
        headline = Text(headline_text(view, now), no_wrap=True, overflow="ellipsis")
        self._live.update(Group(headline, *table_parts(view, room)), refresh=True)

    def _close(self, view: SweepView, now: float) -> None:
        self.leave()
        for part in table_parts(view, ROWS_AT_THE_END):
            there = self._console.is_terminal
            self._console.print(part, soft_wrap=not there, width=None if there else max(self._console.width, WIDE))
        self._print(headline_text(view, now))

    def _print(self, text: str) -> None:
        from rich.text import Text

        self._console.print(Text(text), soft_wrap=True)


def headline_text(view: SweepView, now: float) -> str:
    """`12 of 24 trials: 5 done, 2 running, 5 stopped  in 1:23  best accuracy 0.98 (trial 7)`."""
    counts = {state: count for state, count in view.counts().items() if count}
    waiting = counts.pop("waiting", 0)
    ended = sum(count for state, count in counts.items() if state in FINAL)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    states = states or (f"{waiting} waiting" if waiting else "none has begun")
    best = f"best {best_text(view)}" if view.best is not None else ""
    parts = [f"{ended} of {view.num_samples} trials: {states}", f"in {eta(view.elapsed_s(now))}", best]
    return "  ".join(filter(None, parts))


def best_text(view: SweepView) -> str:
    """`accuracy 0.98 (trial 7, epoch 9)  LR 0.00421  GRAD_NORM_CLIP 3.1`."""
    best = view.best
    if best is None:
        return "none yet"
    at = f"trial {best.number}, epoch {best.best_epoch}"
    return "  ".join([f"{view.metric} {number(best.best)} ({at})", *_params_text(best, view)])


def trial_text(trial: TrialView, view: SweepView) -> str:
    """`trial 7 stopped after epoch 3/10  best accuracy 0.81  LR 0.2  GRAD_NORM_CLIP 3.1`; of a failed one its error."""
    head = f"trial {trial.number} {trial.state} after epoch {trial.epoch}/{view.num_epochs}"
    if trial.state == "failed":
        lines = (trial.error or "").strip().splitlines() or ["the process died"]
        logs = f" (logs: {masked(trial.logs)})" if trial.logs else ""
        error = masked(lines[-1])
        cut = error if len(error) <= ERROR_LENGTH else f"{error[:ERROR_LENGTH]}..."
        return clean(f"{head}: {cut}{logs}")
    metric = [f"best {view.metric} {number(trial.best)}"] if trial.best is not None else []
    return "  ".join([head, *metric, *_params_text(trial, view)])


def _params_text(trial: TrialView, view: SweepView) -> list[str]:
    names = short_names(view.keys)
    return [clean(f"{names[key]} {param(value)}") for key, value in trial.params.items() if key in names]


def param(value: Any) -> str:
    """A swept value in three digits; anything but a number as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table_parts(view: SweepView, room: int) -> Sequence[Any]:
    """The table of at most `room` trials, best first, and a line on those left out."""
    from rich.text import Text

    rows = rows_shown(view, room)
    left = len(view.trials) - len(rows)
    more = [Text(f"... and {left} more in sweep.csv", style="dim")] if left else []
    return [_table(view, rows), *more]


def rows_shown(view: SweepView, room: int) -> list[TrialView]:
    """The best, those that run, then the rest by rank, as many as there is room for; best first."""
    ranked = view.ranked()
    running = [trial for trial in ranked if trial.state == "running"]
    wanted = [*ranked[:BEST_KEPT], *running, *ranked[BEST_KEPT:]]
    kept = set(list(dict.fromkeys(trial.number for trial in wanted))[:room])
    return [trial for trial in ranked if trial.number in kept]


def _table(view: SweepView, rows: list[TrialView]) -> Table:
    from rich.table import Table
    from rich.text import Text

    names = short_names(view.keys)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("trial", *names.values(), "epoch", view.metric, "best", "state"):
        right = title != "state"
        table.add_column(Text(clean(title)), justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
    best = view.best
    for trial in rows:
        cells = [
            str(trial.number),
            *(param(trial.params[key]) if key in trial.params else "" for key in names),
            f"{trial.epoch}/{view.num_epochs}",
            number(trial.value) if trial.curve else "",
            number(trial.best) if trial.best is not None else "",
            f"{trial.state}, the best" if trial is best else trial.state,
        ]
        style = f"bold {STYLES[trial.state]}" if trial is best else STYLES[trial.state]
        table.add_row(*(Text(clean(cell)) for cell in cells), style=style)
    return table
