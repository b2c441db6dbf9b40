"""How the workers that a cluster has room for are shared among elastic trials."""

from __future__ import annotations

import pytest

from raytrain.sweep.quota import fair_shares

EIGHT = [1, 2, 3, 4, 8]  # the sizes worth having with eight virtual workers


@pytest.mark.parametrize(
    ("room", "before", "shares"),
    [
        (8, {}, {0: 3, 1: 3, 2: 2}),
        (9, {}, {0: 3, 1: 3, 2: 3}),
        (11, {}, {0: 4, 1: 4, 2: 3}),
        (14, {}, {0: 4, 1: 4, 2: 4}),  # 5, 6 and 7 are no faster than 4
        (16, {}, {0: 8, 1: 4, 2: 4}),
        (16, {2: 8}, {0: 4, 1: 4, 2: 8}),  # who has more keeps it
        (8, {1: 2, 2: 3}, {0: 2, 1: 3, 2: 3}),
        (2, {}, {0: 1, 1: 1, 2: 1}),  # one of them waits for its first
        (99, {}, {0: 8, 1: 8, 2: 8}),
    ],
)
def test_the_trial_with_fewest_workers_gets_more_first(
    room: int, before: dict[int, int], shares: dict[int, int]
) -> None:
    assert fair_shares(room, [0, 1, 2], EIGHT, before) == shares


def test_a_trial_alone_has_all_that_makes_it_faster() -> None:
    assert fair_shares(7, [5], EIGHT, {}) == {5: 4}
    assert fair_shares(7, [5], [3, 4, 8], {}) == {5: 4}
    assert fair_shares(7, [], EIGHT, {}) == {}
