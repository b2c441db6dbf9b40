"""Where a run stands: steps, epochs and cursors agree, whatever the numbers."""

from __future__ import annotations

import itertools

import pytest

from raytrain.data.sampler import epoch_order, step_samples
from raytrain.progress import Plan, Progress

PLANS = [
    Plan(num_samples, batch_size, virtual_workers, accumulate, 3, last)
    for num_samples, batch_size, virtual_workers, accumulate, last in itertools.product(
        (1, 2, 7, 64, 101), (1, 4), (1, 2, 3), (1, 2), ("keep", "drop", "pad")
    )
    if last != "drop" or num_samples >= batch_size * virtual_workers  # else nothing is left
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_run_advances_through_every_epoch_in_exactly_the_planned_steps(plan: Plan) -> None:
    progress, steps = Progress(), 0
    while not plan.finished(progress):
        began = progress
        order = epoch_order(plan.num_samples, 0, progress.epoch, True)
        for shares in step_samples(order, 0, plan):
            assert progress.epoch == began.epoch
            progress, steps = plan.advanced(progress, shares.numel()), steps + 1
            assert progress.step == steps
        assert progress == Progress(began.epoch + 1, 0, (began.epoch + 1) * plan.steps_per_epoch)
    assert steps == plan.total_steps == 3 * plan.steps_per_epoch


def test_the_last_short_batch_is_kept_as_in_the_heritage() -> None:
    assert Plan(num_samples=9, batch_size=4, virtual_workers=1, accumulate=1, num_epochs=1).steps_per_epoch == 3
    # 10 samples for 3 ranks: each takes ceil(10 / 3) = 4 (two padded), that is 2 batches of 2.
    assert Plan(num_samples=10, batch_size=2, virtual_workers=3, accumulate=1, num_epochs=1).steps_per_epoch == 2
    assert Plan(num_samples=10, batch_size=2, virtual_workers=3, accumulate=2, num_epochs=1).steps_per_epoch == 1


def test_progress_orders_by_epoch_then_by_cursor() -> None:
    assert Progress(0, 8, 1) < Progress(0, 16, 2) < Progress(1, 0, 3)


def test_a_changed_plan_keeps_the_place_in_the_data_and_takes_its_own_step() -> None:
    before = Plan(num_samples=64, batch_size=4, virtual_workers=2, accumulate=1, num_epochs=5)
    after = Plan(num_samples=64, batch_size=2, virtual_workers=2, accumulate=1, num_epochs=5)
    progress = after.converted(3, 24)
    assert progress == Progress(3, 24, 3 * after.steps_per_epoch + 6)
    assert after.steps_per_epoch == 2 * before.steps_per_epoch


@pytest.mark.parametrize("batch_size", [2, 3, 5, 16])
def test_a_run_under_a_changed_plan_is_at_the_planned_step_when_the_epoch_ends(batch_size: int) -> None:
    plan = Plan(num_samples=50, batch_size=batch_size, virtual_workers=3, accumulate=1, num_epochs=2)
    progress = plan.converted(0, 17)
    for shares in step_samples(epoch_order(50, 0, 0, True), 17, plan):
        assert progress.epoch == 0
        progress = plan.advanced(progress, shares.numel())
    assert progress == Progress(1, 0, plan.steps_per_epoch)


def test_a_data_set_that_shrank_below_the_cursor_leaves_nothing_of_the_epoch() -> None:
    plan = Plan(num_samples=20, batch_size=4, virtual_workers=1, accumulate=1, num_epochs=5)
    assert plan.converted(2, 20) == plan.converted(2, 24) == Progress(3, 0, 15)
    assert plan.converted(2, 16) == Progress(2, 16, 14)


def test_a_run_is_finished_when_its_epochs_are() -> None:
    plan = Plan(num_samples=8, batch_size=4, virtual_workers=1, accumulate=1, num_epochs=2)
    assert not plan.finished(Progress(1, 4, 3))
    assert plan.finished(Progress(2, 0, 4)) and plan.finished(Progress(3, 0, 6))
    assert plan.samples_per_step == 4 and plan.total_steps == 4
