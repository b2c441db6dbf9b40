import io
import os
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from raytrain.errors import failure_screen
from raytrain.journal import display
from raytrain.journal.display import Display

RUN = {
    "kind": "run",
    "time": 0.0,
    "step": 0,
    "epoch": 0,
    "steps_per_epoch": 140,
    "num_epochs": 20,
    "line_every": 50,
    "tag": "digits(default)",
    "num_samples": 1437,
    "num_workers": 2,
    "virtual_workers": 2,
    "batch_size": 32,
    "accumulate": 1,
    "device": "cpu",
}


def step(number: int, **fields: Any) -> dict[str, Any]:
    values = {
        "kind": "step",
        "time": number * 0.25,
        "step": number,
        "epoch": (number - 1) // 140,
        "iteration": (number - 1) % 140,
        "loss": 0.1234,
        "grad_norm": 3.2149,
        "lr": 1.2e-3,
        "momentum": 0.9,
        "samples": 128,
        "data_s": 0.01,
        "step_s": 0.25,
        "samples_per_s": 512.0,
        "terms": {"hidden": 1.0},
        "disp": {},
    }
    return {**values, **fields}


def shown(*records: dict[str, Any], terminal: bool = False, width: int = 80) -> str:
    out = io.StringIO()
    screen = Display(Console(file=out, force_terminal=terminal, width=width, color_system=None))
    for record in records:
        screen.feed(record)
    screen.close()
    return out.getvalue()


def test_a_run_starts_with_the_batch_arithmetic() -> None:
    assert shown(RUN) == (
        "digits(default): 2 workers (cpu), 1,437 samples, 20 epochs of 140 steps\n"
        "  a step: 2 virtual workers x batch size 32 = 64 samples\n"
    )


def test_an_elastic_run_says_how_many_workers_there_are_of_how_many() -> None:
    elastic = {**RUN, "num_workers": 3, "min_workers": 2, "max_workers": 4}
    start, _, live = shown(elastic, step(1)).splitlines()
    assert start.startswith("digits(default): 3 of 2-4 workers (cpu), ")
    assert "  512 samples/s  3 of 2-4 workers  ETA " in live


def test_a_resumed_run_says_from_where() -> None:
    resumed = {**RUN, "step": 420, "epoch": 3, "resumed_from": "ckpt/checkpoint_epoch_3", "accumulate": 2}
    said = shown({**resumed, "num_workers": 0})
    assert "  resumed from ckpt/checkpoint_epoch_3: epoch 4, after step 420\n" in said
    assert "2 virtual workers x batch size 32 x 2 accumulated = 128 samples" in said
    assert "digits(default): in this process (cpu), " in said


def test_a_file_gets_plain_lines_at_a_calm_rate() -> None:
    lines = shown(RUN, *map(step, range(1, 141))).splitlines()[2:]
    assert [line.split("  ")[1] for line in lines] == ["step 1/2800", "step 50/2800", "step 100/2800", "step 140/2800"]
    assert lines[1] == (
        "epoch 1/20  step 50/2800  loss 0.1234  lr 1.2e-03  grad 3.21  512 samples/s  ETA 11:27"
    )  # longer than 80 columns and still one line


def test_the_eta_starts_with_this_launch() -> None:
    resumed = {**RUN, "step": 2600, "epoch": 18, "time": 9000.0}
    lines = shown(resumed, step(2601, time=9010.0, step_s=1.0), step(2700, time=9109.0)).splitlines()
    assert "step 2601/" not in lines[-2]  # in mid-epoch: not due, yet the pace counts from it
    assert lines[-1].endswith("ETA 1:40")


def test_values_that_were_not_finite_read_as_nan_and_a_missing_norm_is_left_out() -> None:
    bad = step(1, loss=None, grad_norm=None, disp={"acc": None}, nonfinite=["loss", "grad_norm", "disp.acc"])
    assert "loss nan  lr 1.2e-03  grad nan  acc nan  512" in shown(RUN, bad)
    assert "lr 1.2e-03  512 samples/s" in shown(RUN, step(1, grad_norm=None))


def test_a_terminal_gets_one_line_in_place_that_fits_its_width() -> None:
    steps = [step(number, disp={"accuracy": 0.5}) for number in range(1, 141)]
    for width, fits in [
        (120, "epoch 1/20  step 9/2800  loss 0.1234  lr 1.2e-03  grad 3.21  accuracy 0.5  512 samples/s  ETA 11:37"),
        (90, "epoch 1/20  step 9/2800  loss 0.1234  lr 1.2e-03  grad 3.21  512 samples/s  ETA 11:37"),
        (80, "epoch 1/20  step 9/2800  loss 0.1234  grad 3.21  512 samples/s  ETA 11:37"),
        (50, "epoch 1/20  step 9/2800  loss 0.1234  512 samples…"),
    ]:
        out = shown(RUN, *steps, terminal=True, width=width)
        drawn = out.split("\r\x1b[2K")
        assert len(drawn) == 141  # the first with what stands above it, the last followed by its removal
        assert drawn[8] == fits
    assert "\x1b[?25h" in drawn[-2] + drawn[-1]  # the cursor is back


def test_a_terminal_is_redrawn_at_most_ten_times_a_second() -> None:
    quick = [step(number, time=number * 0.001, epoch=0) for number in range(1, 1001)]
    assert 5 <= shown({**RUN, "steps_per_epoch": 1000}, *quick, terminal=True).count("epoch 1/20") <= 11


def test_text_of_a_user_is_not_taken_for_markup() -> None:
    event = {"kind": "event", "event": "skip", "message": "[red]sample[/red] :smile: [/]"}
    assert shown(event) == "skip: [red]sample[/red] :smile: [/]\n"
    assert shown(event, terminal=True) == "skip: [red]sample[/red] :smile: [/]\n"


def test_evaluations_read_as_one_line_and_checkpoints_are_silent() -> None:
    evaluated = {"kind": "eval", "epoch": 3, "step": 420, "metrics": {"accuracy": 0.98123, "frames": 8}, "best": True}
    saved = {"kind": "checkpoint", "epoch": 3, "step": 420, "name": "checkpoint_epoch_3"}
    assert shown(RUN, evaluated, saved).splitlines()[2:] == ["epoch 3  accuracy 0.9812  frames 8  best so far"]


def test_the_end_says_how_good_and_where_to_look() -> None:
    end = {
        "kind": "end",
        "status": "finished",
        "epoch": 20,
        "step": 2800,
        "seconds": 41.0,
        "metrics": {"accuracy": 0.9861},
        "best": {"accuracy": 0.9889},
        "weights": "3f9c12ab04d7" + "0" * 52,
        "checkpoint": "output/digits/default/ckpt/checkpoint_epoch_20",
        "run_dir": "output/digits/default",
    }
    assert shown(RUN, end).splitlines()[2:] == [
        "finished after epoch 20, step 2800 in 0:41",
        "  accuracy     0.9861",
        "  best         accuracy 0.9889",
        "  weights      3f9c12ab04d7",
        "  checkpoint   output/digits/default/ckpt/checkpoint_epoch_20",
        "  run folder   output/digits/default",
        "  curves       tensorboard --logdir output/digits/default/tensorboard",
    ]


def test_curves_behind_a_uri_are_not_said_to_be_ready_for_tensorboard() -> None:
    end = {"kind": "end", "status": "finished", "epoch": 1, "step": 2, "run_dir": "s3://bucket/run?region=eu-west-1"}
    *_, last = shown(RUN, end).splitlines()
    assert last == "  curves       copy s3://bucket/run/tensorboard?region=eu-west-1 to a disk, for tensorboard"


def test_a_failure_fits_one_screen_and_keeps_the_reason() -> None:
    trace = ["Traceback (most recent call last):", *(f'  File "deep.py", line {n}' for n in range(200))]
    failure = {
        "rank": 1,
        "step": 7,
        "epoch": 0,
        "sample_ids": range(40),
        "traceback": "\n".join([*trace, "ValueError: " + "x" * 5000]),
        "logs": "output/digits/default/logs",
    }
    lines = failure_screen(failure).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 250
    assert lines[0] == "Training failed on rank 1 at step 7 (epoch 1)"
    assert lines[1] == "samples: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 28 more"
    assert lines[3] == "  Traceback (most recent call last):"
    assert any("lines left out" in line for line in lines)
    assert lines[-3].startswith("  ValueError: xxx")
    assert lines[-1] == "Full logs: output/digits/default/logs"


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ({}, "Training failed\n\n  no traceback arrived: the process died"),
        ({"rank": 0, "error": "killed"}, "Training failed on rank 0\n\n  killed"),
    ],
)
def test_a_failure_of_which_little_is_known_says_what_is(failure: dict[str, Any], said: str) -> None:
    assert failure_screen(failure) == said


def test_importing_the_display_loads_no_rich() -> None:
    probe = f"import sys, {display.__name__}; print('rich' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_a_run_that_nobody_reads_any_more_goes_on() -> None:
    """As in `raytrain train ... | head`: rich would end the process."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as file:
        screen = Display(Console(file=file))
        for record in (RUN, step(1), step(50)):
            screen.feed(record)
        screen.close()
