"""What is seen of a sweep: one table that fits the screen, and calm lines where there is no screen."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import sweeps_for_tests
from rich.console import Console
from sweeps_for_tests import SWEEP, of, trial, write_sweep

from raytrain.sweep.display import SweepDisplay, headline_text, rows_shown, trial_text
from raytrain.sweep.view import SweepView, view_of


def result(number: int, epoch: int, value: float, at: float = 1.0) -> dict[str, Any]:
    return {"kind": "result", "time": at, "trial": number, "epoch": epoch, "step": epoch, "value": value}


def shown(*records: dict[str, Any], terminal: bool = False, closed: bool = False, **console: Any) -> str:
    out, view = io.StringIO(), SweepView()
    console = {"width": 100, "height": 25, **console}
    screen = SweepDisplay(Console(file=out, force_terminal=terminal, color_system=None, **console))
    for at, record in enumerate(records):
        view.add(record)
        screen.show(view, float(at))
    screen.close(view, 83.0) if closed else screen.leave()
    return out.getvalue()


RECORDS = (
    SWEEP,
    *map(trial, range(4)),
    result(0, 1, 0.5),
    result(1, 1, 0.8),
    result(0, 2, 0.6),
    of("stopped", 0, 2, why="asha"),
    of("done", 1, 9),
    of("failed", 2, 1, error="Traceback\nOSError: s3://me:secret@bucket [red] \x1b[2J", logs="trial_0002/logs"),
)


def test_a_file_gets_a_line_for_each_new_best_and_each_trial_that_ends() -> None:
    assert shown(*RECORDS).splitlines() == [
        "best so far: accuracy 0.5 (trial 0, epoch 1)  LR 0.00421  GRAD_NORM_CLIP 3.1",
        "best so far: accuracy 0.8 (trial 1, epoch 1)  LR 0.00421  GRAD_NORM_CLIP 3.1",
        "trial 0 stopped after epoch 2/9  best accuracy 0.6  LR 0.00421  GRAD_NORM_CLIP 3.1",
        "trial 1 done after epoch 9/9  best accuracy 0.8  LR 0.00421  GRAD_NORM_CLIP 3.1",
        "trial 2 failed after epoch 1/9: OSError: s3://me:***@bucket [red] �[2J (logs: trial_0002/logs)",
    ]


def test_of_earlier_launches_only_failures_are_said_again() -> None:
    out, view = io.StringIO(), view_of([*RECORDS, SWEEP])
    screen = SweepDisplay(Console(file=out, width=100))
    screen.show(view, 1.0)
    view.add(of("done", 3, 9))
    screen.show(view, 2.0)
    said = [line.split(" after ")[0] for line in out.getvalue().splitlines()]
    assert said == ["trial 2 failed", "best so far: accuracy 0.8 (trial 1, epoch 1)  LR 0.00421  GRAD_NORM_CLIP 3.1",
                    "trial 3 done"]  # fmt: skip


def test_nothing_is_said_twice() -> None:
    again = (*RECORDS, *[result(3, epoch, 0.1) for epoch in range(1, 9)])
    assert shown(*again) == shown(*RECORDS)


def test_at_the_end_the_table_is_printed_best_first_with_a_headline() -> None:
    lines = shown(*RECORDS, closed=True).splitlines()[-6:]
    assert lines[0].split() == ["trial", "LR", "GRAD_NORM_CLIP", "epoch", "accuracy", "best", "state"]
    assert lines[1].split() == ["1", "0.00421", "3.1", "9/9", "0.8", "0.8", "done,", "the", "best"]
    assert [line.split()[0] for line in lines[1:5]] == ["1", "0", "3", "2"]  # what has failed stands last
    assert lines[5] == (
        "3 of 4 trials: 1 done, 1 stopped, 1 failed  in 1:23  "
        "best accuracy 0.8 (trial 1, epoch 1)  LR 0.00421  GRAD_NORM_CLIP 3.1"
    )


def test_a_terminal_gets_one_table_in_place_and_lines_of_failures_alone() -> None:
    out = shown(*RECORDS, terminal=True)
    assert out.count("best so far") == out.count("trial 0 stopped") == 0
    assert out.count("trial 2 failed after epoch 1/9: OSError") == 1
    assert out.endswith("\x1b[2K") or "\x1b[?25h" in out  # it is taken away, and the cursor is back
    assert "GRAD_NORM_CLIP" in out
    assert "secret" not in out


def test_a_long_sweep_fits_a_short_screen_and_keeps_the_best_and_the_running(tmp_path: Path) -> None:
    view = write_sweep(tmp_path)
    view.add({**of("start", 23, 1), "time": view.newest["time"]})
    rows = rows_shown(view, 6)
    assert [row.number for row in rows[:3]] == [row.number for row in view.ranked()[:3]]
    assert 23 in [row.number for row in rows]
    assert len(rows) == 6
    out = io.StringIO()
    screen = SweepDisplay(Console(file=out, force_terminal=True, color_system=None, width=100, height=12))
    screen.show(view, 0.0)
    lines = out.getvalue().splitlines()
    screen.leave()
    failures = 1
    assert len(lines) - failures <= 12
    assert "... and 16 more in sweep.csv" in lines[-1]


def test_a_terminal_is_redrawn_a_few_times_a_second_and_a_thousand_trials_cost_little() -> None:
    out, view = io.StringIO(), SweepView()
    screen = SweepDisplay(Console(file=out, force_terminal=True, color_system=None, width=100, height=25))
    view.add(SWEEP)
    for number in range(1000):
        view.add(trial(number))
    for index in range(100):
        view.add(result(index, 1, 0.001 * index))
        screen.show(view, index * 0.01)
    screen.leave()
    assert 4 <= out.getvalue().count("of 1000 trials:") <= 6


def test_a_trial_that_runs_again_tells_of_its_end_again() -> None:
    again = shown(*RECORDS, of("start", 2, 1), of("done", 2, 9))
    assert again.splitlines()[-1].startswith("trial 2 done after epoch 9/9")


def test_the_headline_of_a_sweep_that_has_just_begun() -> None:
    view = SweepView()
    view.add(SWEEP)
    assert headline_text(view, 5.0) == "0 of 4 trials: none has begun  in 0:05"
    view.add(of("trial", 0, 0, params={}))
    assert headline_text(view, 5.0) == "0 of 4 trials: 1 waiting  in 0:05"


def test_a_failure_without_an_error_says_that_the_process_died() -> None:
    view = SweepView()
    for record in (SWEEP, trial(0), of("failed", 0, 0)):
        view.add(record)
    assert trial_text(view.trials[0], view) == "trial 0 failed after epoch 0/9: the process died"


def test_a_sweep_goes_on_when_nobody_reads_any_more() -> None:
    code = (
        "from raytrain.sweep.view import SweepView\nfrom raytrain.sweep.display import SweepDisplay\n"
        "from sweeps_for_tests import SWEEP, of, trial\nimport sys\n"
        "view, screen = SweepView(), SweepDisplay()\nview.add(SWEEP)\n"
        "for n in range(3000):\n    view.add(trial(n)); view.add(of('done', n, 9)); screen.show(view, n)\n"
        "screen.close(view, 1.0)\nprint('went on', file=sys.stderr)"
    )
    reader, writer = os.pipe()
    os.close(reader)
    here = Path(sweeps_for_tests.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "went on\n")
