"""Clip advice: what the journals' gradient norms say, counted with the clip that held at each step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeps_for_tests import CLIP, LR, write_journal, write_sweep

from raytrain.journal.sinks import JsonlSink
from raytrain.storage.lock import JOURNAL
from raytrain.storage.storage import open_storage
from raytrain.sweep.advice import (
    ClipAdvice,
    TrialNorms,
    advice_lines,
    advice_of,
    clip_advice,
    clip_at,
    clips_of,
    norms_of,
    quantile,
    touched,
)
from raytrain.sweep.view import TrialView


def trial_with(folder: Path, norms: list[float | None], optimization: dict[str, Any], per_epoch: int = 2) -> None:
    """Trial 0's run folder, `per_epoch` steps an epoch."""
    (folder / "trial_0000").mkdir(parents=True)
    (folder / "trial_0000" / "config.yaml").write_text(yaml.safe_dump({"OPTIMIZATION": optimization}))
    sink = JsonlSink(folder / "trial_0000" / JOURNAL)
    for index, norm in enumerate(norms):
        sink.write({"kind": "step", "time": 0.0, "step": index + 1, "epoch": index // per_epoch, "grad_norm": norm})
    sink.flush()
    sink.close()


def norms(folder: Path, trial: TrialView) -> TrialNorms:
    return norms_of(open_storage(str(folder)), trial)


def even(number: int, clip: float | None, top: float = 100.0) -> TrialNorms:
    """A trial with a hundred norms from top/100 to top, after a warm-up of 1000."""
    ordered = [top * share / 100 for share in range(1, 101)]
    return TrialNorms(number, [1000.0] * 11 + ordered, clip, touched(ordered, clip) if clip else 0.0)


def test_a_step_is_touched_where_its_norm_is_above_the_clip(tmp_path: Path) -> None:
    trial_with(tmp_path, [1.0, 2.0, 3.0, 4.0], {"GRAD_NORM_CLIP": 100.0})
    seen = norms(tmp_path, TrialView(0, {CLIP: 3.0}))
    assert (seen.clip, seen.touched, seen.norms) == (3.0, 0.25, [1.0, 2.0, 3.0, 4.0])


def test_a_clip_that_is_not_swept_is_the_config_s_and_none_touches_nothing(tmp_path: Path) -> None:
    trial_with(tmp_path, [1.0, 2.0, 3.0, 4.0], {"GRAD_NORM_CLIP": 1.5})
    assert norms(tmp_path, TrialView(0, {LR: 0.1})).touched == 0.75
    assert norms(tmp_path, TrialView(0, {CLIP: None})).touched == 0.0


def test_phases_change_the_clip_from_their_epoch_on(tmp_path: Path) -> None:
    phases = [{"FROM_EPOCH": 2, "LR": 0.1}, {"FROM_EPOCH": 1, "GRAD_NORM_CLIP": 2.0}]
    trial_with(tmp_path, [3.0, 3.0, 3.0, 1.0, 1.0, 5.0], {"GRAD_NORM_CLIP": 4.0, "PHASES": phases})
    seen = norms(tmp_path, TrialView(0, {}))
    assert (seen.clip, seen.touched) == (2.0, 2 / 6)


def test_a_clone_s_steps_are_counted_with_its_own_clips_not_with_those_it_took_over() -> None:
    own = TrialView(0, {CLIP: 2.0}, clones=[(3, 1)], history=[(0, {CLIP: 8.0}), (3, {CLIP: 2.0})])
    clips = clips_of(own, {"GRAD_NORM_CLIP": 5.0, "PHASES": [{"FROM_EPOCH": 1, "GRAD_NORM_CLIP": 7.0}]})
    assert [clip_at(clips, epoch) for epoch in range(5)] == [8.0, 8.0, 8.0, 2.0, 2.0]


def test_a_norm_that_was_not_finite_and_a_missing_journal_are_left_out(tmp_path: Path) -> None:
    trial_with(tmp_path, [1.0, None, 3.0], {"GRAD_NORM_CLIP": 2.0})
    assert norms(tmp_path, TrialView(0, {})).norms == [1.0, 3.0]
    assert norms(tmp_path, TrialView(1, {CLIP: 2.0})) == TrialNorms(1, [], 2.0, 0.0)


def test_quantiles_and_shares_agree() -> None:
    ordered = [float(value) for value in range(1, 101)]
    assert [quantile(ordered, q) for q in (0.01, 0.5, 0.9, 0.99, 1.0)] == [1.0, 50.0, 90.0, 99.0, 100.0]
    assert touched(ordered, 90.0) == pytest.approx(0.1)
    assert touched(ordered, 0.5) == 1.0


def test_the_range_touches_from_a_tenth_to_a_hundredth_of_the_better_trials_steps_after_warm_up() -> None:
    advice = advice_of([even(3, 95.0), even(1, None), even(0, 5.0, top=1e4), even(2, 5.0, top=1e4)])
    assert advice.better == [3, 1]
    assert len(advice.taken) == 200  # of 111 each the first 11 are warm-up
    assert (advice.low, advice.high) == (90.0, 99.0)
    assert all(touched(advice.taken, clip) == share for clip, share in advice.ladder)
    assert [share for _, share in advice.ladder] == sorted((share for _, share in advice.ladder), reverse=True)
    assert 3 <= len(advice.ladder) <= 10


def test_the_range_reaches_down_to_the_clip_of_the_best_trial() -> None:
    assert advice_of([even(0, 7.0)]).low == 7.0
    assert "begins below that 90 % because the best trial clips at 7" in "\n".join(
        advice_lines(advice_of([even(0, 7.0)]))
    )


def test_too_few_norms_give_no_advice_but_say_what_to_do() -> None:
    few = advice_of([TrialNorms(0, [1.0] * 9, 1.0, 0.0)])
    assert (few.low, few.high, few.ladder) == (None, None, [])
    assert advice_lines(few) == [
        "clip advice: none; 9 gradient norms in the journals of the better trials are too few (50 are needed). "
        "Train longer, or journal more steps: LOG.EVERY: 1"
    ]
    assert "none; 0 gradient norms" in advice_lines(advice_of([]))[0]


def test_the_advice_of_a_sweep_reads_as_people_speak(tmp_path: Path) -> None:
    view = write_sweep(tmp_path, num_trials=6)
    advice = clip_advice(open_storage(str(tmp_path)), view)
    assert [trial.number for trial in advice.trials] == [trial.number for trial in view.ranked()]
    lines = advice_lines(advice)
    best = advice.trials[0]
    assert lines[0] == f"clip advice: try GRAD_NORM_CLIP from {advice.low:g} to {advice.high:g}"
    assert "after warm-up, of the 3 better of 6 trials: half are below" in lines[1]
    assert any(f"trial {best.number}, the best, clips at {best.clip:.3g}, which touched" in line for line in lines)
    assert lines[-1].strip().startswith(f"to search there  {CLIP}: {{loguniform: [")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_advice_scales_with_the_norms(tmp_path: Path, scale: float) -> None:
    def advised(of: float) -> ClipAdvice:
        folder = tmp_path / str(of)
        write_journal(folder / "trial_0000", {}, 9, random.Random(0), of)
        return advice_of([norms(folder, TrialView(0, {}))])

    one, other = advised(1.0), advised(scale)
    assert one.low is not None
    assert one.high is not None
    assert other.low == pytest.approx(scale * one.low)
    assert other.high == pytest.approx(scale * one.high)
