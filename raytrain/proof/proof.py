"""The promise that a run is a function, tried on a config: the same few steps in several ways, compared to the bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from raytrain.config.sections import Config
from raytrain.errors import EXIT_USAGE
from raytrain.proof.difference import Difference, Trace, first_difference
from raytrain.proof.processes import running
from raytrain.proof.remedies import remedy
from raytrain.proof.ways import AGAIN, LOADERS, RESUMED, WORKERS, Way, virtual_workers_of, ways_of, why_not

SHOWN = 3  # attributes, and notes
ALIKE = 24  # characters in which notes begin that say the same, of another sample or with other numbers
COLUMN = 33


def prove(
    cfg: Config, steps: int, only: Sequence[str], say: Callable[[str], None], timeout_s: float | None = None
) -> bool:
    """Takes the same steps in several ways, and says what comes out otherwise in which; whether all agree.

    Each way is a trial in processes of its own. Nothing of the run's own folder is read or written.
    only:      the kinds that are to be tried, of ways.KINDS; all if it is empty
    timeout_s: how long one may take; None: as straight, many times over
    """
    began_s = time.monotonic()
    virtual_workers, notes = virtual_workers_of(cfg)
    ways, agreed = ways_of(virtual_workers, only), 0
    found: list[list[str]] = []
    told: list[str] = []  # by the run itself, of ways that differ
    with running(cfg, steps, virtual_workers, timeout_s) as trials:
        straight = trials.straight(ways)
        told += straight["notes"]
        taken = f"{straight['last']} step{'s' * (straight['last'] > 1)}"
        say(f"{cfg.TAG}: {taken}, {virtual_workers} virtual workers, {straight['device']}")
        for note in [*notes, *notes_on(straight, steps)]:
            say(f"  note: {note}")
        reasons = {way: reason for way in ways if (reason := why_not(way, cfg, straight))}
        for way, reason in reasons.items():
            say_of(way, f"not tried: {reason}", say)
        for way, traces in trials.taken([way for way in ways if way not in reasons]):
            if is_refused(way, cfg, traces):
                say_of(way, f"refused, and the config has none: {traces[0]['failed'].splitlines()[0]}", say)
                continue
            difference = first_difference(straight, traces, loads_elsewhere=way.loaders > 0)
            say_of(way, verdict(difference), say)
            if difference is None:
                agreed += 1
                continue
            found.append(explained(way, difference, straight, traces))
            told += [note for trace in traces for note in trace.get("notes", ())]
            if way.kind == AGAIN:  # then so do the others, for no reason of their own
                found = found[-1:]
                break
    for line in (line for lines in found for line in ("", *lines)):
        say(line)
    if found and told:
        by_beginning = {note[:ALIKE]: note for note in reversed(told)}
        say("")
        for note in list(reversed(by_beginning.values()))[:SHOWN]:
            say(f"note of the run: {note}")
    if not found:
        ways_agreed = f"{agreed} other way{'s' * (agreed != 1)}"
        say(f"all agree: {taken} gave the same bits in {ways_agreed} ({time.monotonic() - began_s:.0f} s)")
    return not found


def notes_on(straight: Trace, steps: int) -> list[str]:
    """What a user should know of the steps that were taken straight."""
    notes = [f"the whole run has {straight['last']} steps"] if straight["last"] < steps else []
    if straight["bad_steps"]:
        notes.append(
            f"{straight['bad_steps']} of the steps had a loss or gradient that was not finite, or a spike: they change "
            "nothing, so they show less"
        )
    return notes


def say_of(way: Way, what: str, say: Callable[[str], None]) -> None:
    say(f"  {way.title:<{COLUMN}}{what}")


def is_refused(way: Way, cfg: Config, traces: Sequence[Trace]) -> bool:
    """Whether the task cannot go to loader workers, and need not: what does not pickle trains well without them."""
    refused = any(trace.get("status") == EXIT_USAGE for trace in traces)
    return way.kind == LOADERS and cfg.LOADER.WORKERS == 0 and refused


def verdict(difference: Difference | None) -> str:
    if difference is None:
        return "agrees"
    if difference.kind == "failure":
        return "fails"
    return f"differs in step {difference.step}" if difference.step else "differs at the start"


def explained(way: Way, difference: Difference, straight: Trace, traces: Sequence[Trace]) -> list[str]:
    """The lines of one difference: what, what may be behind it, and what to write instead."""
    if difference.kind == "failure":
        first, *rest = difference.what.splitlines()
        lines = [f"{way.title}: fails, as it does not straight: {first}", *rest]
    else:
        step = f", in step {difference.step}" * (difference.step > 0)
        lines = [f"{way.title}: first not the same{step}: {difference.what}"]
    shown, more = difference.changes[:SHOWN], len(difference.changes) - SHOWN
    if shown:
        unsaved = "; no checkpoint holds it" * (way.kind == RESUMED)
        lines.append(f"  held otherwise there: {', '.join(map(str, shown))}{f' and {more} more' * (more > 0)}{unsaved}")
    asked = sorted({each for trace in traces for each in trace.get("asked", ())}) if way.kind == WORKERS else []
    if asked:
        lines.append(f"  the task asks which rank it is, or how many there are: {', '.join(asked)}")
    return [*lines, f"  {remedy(way.kind, difference, straight['classes'], asked)}"]
