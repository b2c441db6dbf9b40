"""What each search tries."""

import math
import sys

import pytest

from raytrain.config.sections import Config
from raytrain.errors import ConfigError
from raytrain.sweep.search import Observation, Search, build_search

LR, CLIP, DEPTH = "OPTIMIZATION.LR", "OPTIMIZATION.GRAD_NORM_CLIP", "MODEL.DEPTH"
RANGES = {LR: {"loguniform": [1e-5, 1.0]}, CLIP: {"loguniform": [0.01, 100.0]}}
MIXED = {**RANGES, "LOADER.WORKERS": {"randint": [0, 4]}, DEPTH: {"choice": [None, "deep", 3]}}
MODELS = ["tpe", "gp"]


def search_of(search: str, space: dict, seed: int = 0, **tune) -> Search:
    cfg = Config(
        TASK="pkg.module:Class",
        OPTIMIZATION={"BATCH_SIZE_PER_GPU": 4, "NUM_EPOCHS": 3},
        MODEL={"DEPTH": 2},
        TUNE={"SPACE": space, "SEARCH": search, **tune},
    )
    return build_search(cfg, seed)


def loss(params: dict) -> float:
    """Least, 0, at LR 0.01 and a clip of 1: a bowl over their logarithms."""
    return (math.log10(params[LR]) + 2) ** 2 + math.log10(params[CLIP]) ** 2


def swept(search: Search, trials: int) -> list[Observation]:
    told: list[Observation] = []
    for trial in range(trials):
        params = search.params_of(trial, told)
        assert params is not None
        told.append(Observation(params, loss(params)))
    return told


@pytest.mark.parametrize(("kind", "trials"), [("tpe", 25), ("gp", 14)])  # the first ten by chance
def test_a_model_beats_chance_on_a_bowl(kind, trials):
    chance, model = (
        [min(told.value for told in swept(search_of(name, RANGES, seed), count)) for seed in range(3)]
        for name, count in (("random", 25), (kind, trials))
    )
    assert sorted(model)[1] < sorted(chance)[1] / 2


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_model_goes_where_its_mode_points(kind, mode):
    told = [Observation({LR: 10**-exponent, CLIP: 1.0}, exponent) for exponent in (x * 0.25 for x in range(1, 20))]
    search = search_of(kind, RANGES, METRIC="exponent", MODE=mode)
    tried = [-math.log10(search.params_of(trial, told)[LR]) for trial in range(19, 28)]
    assert sorted(tried)[4] < 2 if mode == "min" else sorted(tried)[4] > 3


@pytest.mark.parametrize("kind", MODELS)
def test_a_suggestion_depends_on_seed_trial_and_what_is_told_alone(kind):
    search = search_of(kind, MIXED, seed=3)
    told = swept(search, 12)
    told.append(Observation(search.params_of(12, told), None))
    expected = search.params_of(13, told)
    assert search_of(kind, MIXED, seed=3).params_of(13, told) == expected
    assert search_of(kind, MIXED, seed=4).params_of(13, told) != expected
    assert search.params_of(14, told) != expected
    assert type(expected["LOADER.WORKERS"]) is int and expected[DEPTH] in (None, "deep", 3)


@pytest.mark.parametrize("kind", MODELS)
def test_trials_that_run_that_failed_or_are_of_another_space_are_borne(kind):
    search = search_of(kind, RANGES)
    told = [
        *swept(search, 11),
        Observation({LR: 50.0, CLIP: 1.0}, math.nan),
        Observation({LR: 0.1}, 1.0),
        Observation({LR: 7.0, CLIP: 1.0}, 3.0),
    ]
    params = search.params_of(14, told)
    assert params is not None and 1e-5 <= params[LR] <= 1.0


@pytest.mark.parametrize("kind", ["random", *MODELS])
def test_the_callers_randomness_is_left_alone(kind):
    import numpy as np

    search = search_of(kind, RANGES)
    np.random.seed(5)
    before = np.random.random()
    np.random.seed(5)
    swept(search, 12)
    assert np.random.random() == before


def test_a_random_trial_is_the_same_whatever_was_asked_before():
    search = search_of("random", MIXED, seed=7)
    all_of_them = [search.params_of(trial, []) for trial in range(20)]
    assert search_of("random", MIXED, seed=7).params_of(13, swept(search, 3)) == all_of_them[13]
    assert len({params[LR] for params in all_of_them}) == 20
    assert search_of("random", MIXED, seed=8).params_of(0, []) != all_of_them[0]


def test_a_random_search_crosses_its_grids_with_its_samples():
    search = search_of("random", {"SEED": {"grid": [1, 2, 3]}, LR: {"loguniform": [1e-4, 1]}, DEPTH: {"grid": [1, 2]}})
    assert search.num_trials(4) == 24
    trials = [search.params_of(trial, []) for trial in range(24)]
    assert [(params["SEED"], params[DEPTH]) for params in trials[:7]] == [
        *[(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (1, 1)]
    ]
    assert len({params[LR] for params in trials}) == 24


@pytest.mark.parametrize("kind", ["grid", "random"])
def test_a_grid_is_gone_through_once_however_many_samples_are_asked_for(kind):
    search = search_of(kind, {LR: {"grid": [0.1, 0.2]}, DEPTH: {"grid": [1, None]}})
    trials = [search.params_of(trial, []) for trial in range(5)]
    assert [params and tuple(params.values()) for params in trials] == [
        (0.1, 1),
        (0.1, None),
        (0.2, 1),
        (0.2, None),
        None,
    ]
    assert search.num_trials(1) == search.num_trials(100) == 4


def test_a_space_with_nothing_in_it_is_refused():
    with pytest.raises(ConfigError, match=r"TUNE\.SPACE is empty, so there is nothing to vary"):
        search_of("random", {})


@pytest.mark.parametrize("kind", MODELS)
def test_a_search_whose_package_is_missing_says_how_to_get_it(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=rf'SEARCH is {kind}, but optuna .* pip install "raytrain\[tune\]"'):
        search_of(kind, RANGES)
