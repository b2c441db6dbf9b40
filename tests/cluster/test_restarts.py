"""How often workers are started again: failures on one spot count, those of a run that gets on do not."""

from __future__ import annotations

import pytest

from raytrain.cluster.restarts import RestartBudget


def test_a_run_that_gets_on_is_never_given_up() -> None:
    budget = RestartBudget(None)
    assert all(budget.allows(step, raised=False) for step in (*range(1000), 1000, 990, 1001))


def test_the_third_death_in_one_step_is_the_last() -> None:
    budget = RestartBudget(None)
    assert [budget.allows(step, raised=False) for step in (7, 7, 7)] == [True, True, False]
    assert "failed 3 times in a row without getting beyond step 7" in budget.why_not(raised=False)


def test_what_the_tasks_code_raises_would_come_again_and_ends_the_run() -> None:
    budget = RestartBudget(None)
    assert not budget.allows(7, raised=True) and budget.why_not(raised=True) == ""


@pytest.mark.parametrize("raised", [True, False])
def test_max_failures_is_for_exceptions_and_deaths_alike(raised: bool) -> None:
    budget = RestartBudget(1)
    assert [budget.allows(step, raised) for step in (7, 8, 8)] == [True, True, False]
    assert not RestartBudget(0).allows(7, raised)
    endless = RestartBudget(-1)
    assert all(endless.allows(7, raised) for _ in range(100))


def test_a_run_that_fails_before_its_first_step_gets_no_further_either() -> None:
    budget = RestartBudget(None)
    assert [budget.allows(0, raised=False) for _ in range(3)] == [True, True, False]
    assert "without getting beyond the start" in budget.why_not(raised=False)
