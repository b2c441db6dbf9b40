"""The space of a sweep: what it draws, and what a trial's config is."""

import copy

import pytest

from configs import WHOLE, loaded, refusal
from raytrain.config.distributions import Choices, distribution
from raytrain.config.load import load_config
from raytrain.config.sections import Tune
from raytrain.errors import ConfigError
from raytrain.sweep.search import GridSearch
from raytrain.sweep.space import Space, keyed, objective, sweep_seed, trial_config

SPACE = """\
TUNE:
  SPACE:
    OPTIMIZATION.LR: {loguniform: [1e-4, 1e-1]}
    MODEL.DROPOUT: {uniform: [0, 0.5]}
    MODEL.WIDTH: {quniform: [8, 64, 8]}
    MODEL.VFE.RATES.1: {quniform: [0.1, 0.4, 0.1]}
    LOADER.WORKERS: {randint: [0, 3]}
    OPTIMIZATION.GRAD_NORM_CLIP: {choice: [null, 1, 10.0]}
    SEED: {grid: [1, 2]}
    MODEL.HEADS.0.NAME: {grid: [A, B, C]}
"""


def test_each_distribution_gives_what_its_name_says(tmp_path):
    space = Space.of(loaded(tmp_path, WHOLE + SPACE).TUNE)
    drawn = [space.sample(keyed(0, trial)) for trial in range(200)]
    of = {key: [params[key] for params in drawn] for key in space.entries}
    rates = sorted(of["OPTIMIZATION.LR"])
    assert rates[0] >= 1e-4 and rates[-1] <= 1e-1 and 1e-3 < rates[100] < 1e-2, "half lie on each side of the middle"
    assert all(0 <= rate <= 0.5 for rate in of["MODEL.DROPOUT"])
    assert set(of["MODEL.WIDTH"]) == {8, 16, 24, 32, 40, 48, 56, 64} and all(type(w) is int for w in of["MODEL.WIDTH"])
    assert set(of["MODEL.VFE.RATES.1"]) == {0.1, 0.2, 0.3, 0.4}, "written as a person would"
    assert set(of["LOADER.WORKERS"]) == {0, 1, 2}
    assert set(of["OPTIMIZATION.GRAD_NORM_CLIP"]) == {None, 1, 10.0}
    grids = space.of_grids()
    assert [tuple(grids.at(index).values()) for index in range(grids.size)] == [
        *[(1, "A"), (1, "B"), (1, "C"), (2, "A"), (2, "B"), (2, "C")]
    ]


def test_grids_of_more_combinations_than_memory_holds_are_searched_all_the_same():
    lists = {f"MODEL.{name}": Choices(tuple(range(1000)), crossed=True) for name in "ABCDEFGH"}
    search, last = GridSearch(Space(lists).of_lists()), 10**24 - 1
    assert (search.num_trials(1), search.params_of(last + 1, [])) == (10**24, None)
    assert search.params_of(last - 1, []) == {**dict.fromkeys(lists, 999), "MODEL.H": 998}


def test_a_seed_and_a_trial_give_the_same_params_whatever_was_drawn_before(tmp_path):
    space = Space.of(loaded(tmp_path, WHOLE + SPACE).TUNE)
    assert space.sample(keyed(3, 7)) == [space.sample(keyed(3, trial)) for trial in range(8)][7]
    assert space.sample(keyed(3, 7)) != space.sample(keyed(4, 7)) != space.sample(keyed(3, 8))


def test_a_trials_config_is_the_sweeps_with_constants_and_params_and_no_sweep(tmp_path):
    sweep = loaded(tmp_path, WHOLE + SPACE + "  CONSTANTS: {OPTIMIZATION.NUM_EPOCHS: 1, LOADER.PREFETCH: 7}\n")
    before = copy.deepcopy(sweep)
    params = Space.of(sweep.TUNE).sample(keyed(0, 3))
    trial = trial_config(sweep, params, 3)
    assert sweep == before
    assert ("default/trial_0003", Tune()) == (trial.EXTRA_TAG, trial.TUNE)
    assert (trial.OPTIMIZATION.NUM_EPOCHS, trial.LOADER.PREFETCH) == (1, 7)
    assert params["OPTIMIZATION.LR"] == trial.OPTIMIZATION.LR, "to the last bit"
    assert [0.1, params["MODEL.VFE.RATES.1"]] == trial.MODEL.VFE.RATES
    assert params["MODEL.HEADS.0.NAME"] == trial.MODEL.HEADS[0].NAME


def test_params_that_cannot_be_are_refused_by_the_trials_name(tmp_path):
    sweep = loaded(tmp_path, WHOLE)
    with pytest.raises(ConfigError, match=r"^trial_0012: OPTIMIZATION\.LR is -1, but it must be a number > 0$"):
        trial_config(sweep, {"OPTIMIZATION.LR": -1}, 12)


def test_what_trials_are_compared_by_is_the_sweeps_metric_or_the_checkpoints_or_the_loss(tmp_path):
    def told(*words):
        return objective(loaded(tmp_path, WHOLE, *words))

    kept = ("CHECKPOINT.METRIC", "error", "CHECKPOINT.MODE", "min")
    assert told() == ("loss", "min")
    assert told(*kept) == told(*kept, "TUNE.METRIC", "error") == ("error", "min")
    assert told(*kept, "TUNE.METRIC", "accuracy") == ("accuracy", "max")
    assert told(*kept, "TUNE.MODE", "max") == ("error", "max")


def test_a_sweeps_seed_is_its_own_or_the_configs(tmp_path):
    assert sweep_seed(loaded(tmp_path, WHOLE, "SEED", "5")) == 5
    assert sweep_seed(loaded(tmp_path, WHOLE, "SEED", "5", "TUNE.SEED", "0")) == 0


def test_a_sweep_is_set_on_the_command_line_too(tmp_path):
    words = ["TUNE.SCHEDULER", "asha", "TUNE.NUM_SAMPLES", "8", "TUNE.CONSTANTS.LOADER.WORKERS", "0"]
    whole = loaded(tmp_path, WHOLE, *words, "TUNE.SPACE", "{OPTIMIZATION.LR: {loguniform: [1e-4, 1]}}").TUNE
    one = loaded(tmp_path, WHOLE, *words, "TUNE.SPACE.OPTIMIZATION.LR", "{loguniform: [1e-4, 1]}").TUNE
    assert whole == one and one.SPACE == {"OPTIMIZATION.LR": {"loguniform": [1e-4, 1]}}
    assert (one.SCHEDULER, one.NUM_SAMPLES, one.CONSTANTS) == ("asha", 8, {"LOADER.WORKERS": 0})
    other = load_config(tmp_path / "x.yaml", ["TUNE.SPACE.OPTIMIZATION.LR", "{uniform: [1, 2]}"]).TUNE
    assert other.SPACE == {"OPTIMIZATION.LR": {"uniform": [1, 2]}}
    replaced = loaded(tmp_path, WHOLE + SPACE, "TUNE.SPACE.OPTIMIZATION.LR", "{uniform: [1, 2]}").TUNE
    assert replaced.SPACE["OPTIMIZATION.LR"] == {"uniform": [1, 2]}, "not a mixture of both"


LEGAL = "{loguniform: [low, high]}, {uniform: [low, high]}, {quniform: [low, high, step]}, {randint: [low, end]}"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("SEED: 3", f".SEED is 3, but it must be one of {LEGAL}"),
        ("SEED: {normal: [0, 1]}", f'.SEED is {{"normal": [0, 1]}}, but it must be one of {LEGAL}'),
        ("SEED: {choice: [1], grid: [2]}", '.SEED is {"choice": [1], "grid": [2]}, but it must be one of'),
        ("SEED: {choice: 3}", '.SEED is {"choice": 3}, but choice takes a list: choice: [value, ...]'),
        ("SEED: {grid: []}", '.SEED is {"grid": []}, but grid names no value; it needs at least one'),
        ("SEED: {choice: [1, 2, 1]}", '.SEED is {"choice": [1, 2, 1]}, but 1 stands twice; keep one of them'),
        ("SEED: {randint: [2, 2]}", '.SEED is {"randint": [2, 2]}, but that range is empty: low must be below'),
        ("SEED: {randint: [0, 2.5]}", '.SEED is {"randint": [0, 2.5]}, but randint takes whole numbers; write'),
        ("SEED: {uniform: [1]}", '.SEED is {"uniform": [1]}, but uniform takes numbers: uniform: [low, high]'),
        ("SEED: {uniform: [a, b]}", '.SEED is {"uniform": ["a", "b"]}, but uniform takes numbers: uniform: [low'),
        ("SEED: {uniform: [0, .inf]}", '.SEED is {"uniform": [0, Infinity]}, but a number must be finite'),
        ("SEED: {loguniform: [0, 1]}", '.SEED is {"loguniform": [0, 1]}, but loguniform needs low > 0; raise it'),
        ("SEED: {quniform: [0, 1, 0.3]}", '.SEED is {"quniform": [0, 1, 0.3]}, but steps of 0.3 from 0 do not end'),
        ("SEED: {quniform: [0, 1, 0]}", '.SEED is {"quniform": [0, 1, 0]}, but its step is 0; it must be > 0'),
        ("SEED: {quniform: [0, 1, 2]}", '.SEED is {"quniform": [0, 1, 2]}, but steps of 2 from 0 do not end at 1'),
        ("SEED: {quniform: [0, 1, 1e-30]}", '.SEED is {"quniform": [0, 1, 1e-30]}, but it has more than 9,007,199,254'),
        ("SEED: {quniform: [1e-300, 1, 1e-300]}", '.SEED is {"quniform": [1e-300, 1, 1e-300]}, but it has more than'),
        ("SEED: {randint: [0, 9223372036854775808]}", '.SEED is {"randint": [0, 9223372036854775808]}, but it has mor'),
        (f"SEED: {{randint: [0, 1{'0' * 23}]}}", f'.SEED is {{"randint": [0, 1{"0" * 23}]}}, but it has more than'),
        (f"SEED: {{uniform: [0, {'9' * 400}]}}", f'.SEED is {{"uniform": [0, {"9" * 61}..., but a number must be'),
        (f"SEED: {{randint: [-{'9' * 400}, 0]}}", f'.SEED is {{"randint": [-{"9" * 63}..., but a number must be'),
        ("SEED: {uniform: [-1.7e308, 1.7e308]}", '.SEED is {"uniform": [-1.7e+308, 1.7e+308]}, but a number must be'),
        ("SEED: {uniform: [false, 1]}", '.SEED is {"uniform": [false, 1]}, but uniform takes numbers: uniform: [low'),
        ("SEED: {uniform: [[0], 1]}", '.SEED is {"uniform": [[0], 1]}, but uniform takes numbers: uniform: [low, hi'),
        ('SEED: {randint: ["0", "1"]}', '.SEED is {"randint": ["0", "1"]}, but randint takes numbers: randint: [low, '),
        ("OPTIMIZATION.PHASES.0.LR: {choice: [1]}", ".OPTIMIZATION.PHASES.0.LR: the config has no OPTIMIZATION.PHASES"),
        ("OPTIMIZATION.MOMS.2: {choice: [0.9]}", ".OPTIMIZATION.MOMS.2: the config has no OPTIMIZATION.MOMS.2; OPTIMI"),
        ("OPTIMIZATION.MOMS.-1: {choice: [0.9]}", ".OPTIMIZATION.MOMS.-1: the config has no OPTIMIZATION.MOMS.-1; OPT"),
        ("OPTIMIZATION.LRR: {choice: [1]}", ".OPTIMIZATION.LRR: the config has no OPTIMIZATION.LRR; did you mean OPTI"),
        ("LR: {choice: [1]}", ".LR: the config has no LR; did you mean OPTIMIZATION.LR?"),
        ("MODEL.VFE.NAMES: {choice: [1]}", ".MODEL.VFE.NAMES: the config has no MODEL.VFE.NAMES; did you mean MODEL."),
        (
            "MODEL.VFF.NAME: {choice: [1]}",
            ".MODEL.VFF.NAME: the config has no MODEL.VFF.NAME; did you mean MODEL.VFE.N",
        ),
        ("MODEL.NEW.X: {choice: [1]}", ".MODEL.NEW.X: the config has no MODEL.NEW.X; MODEL has WIDTH, DROPOUT, NAME,"),
        ("MODEL.HEADS.2.NAME: {choice: [1]}", ".MODEL.HEADS.2.NAME: the config has no MODEL.HEADS.2.NAME; MODEL.HEADS"),
        ("OPTIMIZATION.LR: {uniform: [-1, 1]}", ": OPTIMIZATION.LR is -1.0, but it must be a number > 0"),
        ("OPTIMIZATION.OPTIMIZER: {choice: [sgd, lion]}", ': OPTIMIZATION.OPTIMIZER is "lion", but it must be one of'),
        ("LOG.EVERY: {uniform: [1, 9]}", ": LOG.EVERY is 3.5464790894703255, but it must be a whole number >= 1; draw"),
        ("OUTPUT: {choice: [a]}", ".OUTPUT: all trials have the same OUTPUT: it names the folder that holds all"),
        ("TUNE.SEED: {choice: [1]}", ".TUNE.SEED: all trials have the same TUNE: a sweep has one TUNE"),
        ("SCALE.NUM_WORKERS: {choice: [1]}", ".SCALE.NUM_WORKERS: all trials have the same SCALE.NUM_WORKERS: each"),
        ("SCALE: {choice: [{}]}", ".SCALE: all trials have the same SCALE.NUM_WORKERS: each trial takes the same"),
        ("SEED: {choice: [1]}\n  CONSTANTS: {SEED: 2}", ".SEED: CONSTANTS has it too; keep one of them"),
        ("MODEL.VFE.NAME: {choice: [1]}\n  CONSTANTS: {MODEL.VFE: {}}", ".MODEL.VFE.NAME: it lies in MODEL.VFE, which"),
        ("SEED: {choice: [1]}\n  SEARCH: grid", None),
        ("SEED: {randint: [1, 2]}\n  SEARCH: grid", ".SEED: SEARCH grid takes lists only; write grid, or set SEARCH"),
        ("SEED: {grid: [1]}\n  SEARCH: gp", ".SEED: SEARCH gp chooses each value itself; write choice in place of"),
        ("SEED: {choice: [1]}\n  SCHEDULER: pbt", ".SEED: SCHEDULER pbt changes keys in mid-run, and can change OPTI"),
        ("OPTIMIZATION.LR: {choice: [1]}\n  SCHEDULER: pb2", ".OPTIMIZATION.LR: SCHEDULER pb2 takes ranges only (foun"),
    ],
)
def test_a_space_that_cannot_be_is_told_its_line(tmp_path, entry, message):
    text = WHOLE + "TUNE:\n  SPACE:\n    " + entry + "\n"
    if message is None:
        loaded(tmp_path, text)
        return
    place = WHOLE.count("\n") + 3
    assert refusal(tmp_path, text).startswith(f"x.yaml:{place}: TUNE.SPACE{message}")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "CONSTANTS: {LOADER.WORKER: 1}",
            ".CONSTANTS.LOADER.WORKER: the config has no LOADER.WORKER; did you mean LOA",
        ),
        ("CONSTANTS: {LOADER.WORKERS: -1}", ".CONSTANTS: LOADER.WORKERS is -1, but it must be a whole number >= 0"),
        ("CONSTANTS: {EXTRA_TAG: x}", ".CONSTANTS.EXTRA_TAG: all trials have the same EXTRA_TAG: it names the folder"),
        ("SCHEDULER: ahsa", '.SCHEDULER is "ahsa", but it must be one of none, asha, hyperband, median, pbt, pb2'),
        ("SEARCH: bohb", '.SEARCH is "bohb", but BOHB was removed; use SEARCH tpe with SCHEDULER hyperband'),
        ("SEARCH: BOHB", '.SEARCH is "BOHB", but BOHB was removed; use SEARCH tpe with SCHEDULER hyperband'),
        ("SCHEDULER: bohb", '.SCHEDULER is "bohb", but BOHB was removed; use SEARCH tpe with SCHEDULER hyperband'),
        ("NUM_SAMPLES: 0", ".NUM_SAMPLES is 0, but it must be a whole number >= 1"),
        ("REDUCTION: 1", ".REDUCTION is 1, but it must be a whole number >= 2"),
        ("QUANTILE: 0.6", ".QUANTILE is 0.6, but it must be a number > 0 and <= 0.5"),
        ("RESAMPLE: 2", ".RESAMPLE is 2, but it must be a number >= 0 and <= 1"),
        ("BUDGET: {EPOCH: 3}", ".BUDGET.EPOCH is unknown (found 3); did you mean TUNE.BUDGET.EPOCHS?"),
        ("SPACE: 3", ".SPACE is 3, but it must be a mapping of names to a mapping"),
    ],
)
def test_a_wrong_key_of_a_sweep_is_told_its_line(tmp_path, entry, message):
    text = WHOLE + f"TUNE:\n  {entry}\n"
    assert refusal(tmp_path, text).startswith(f"x.yaml:{WHOLE.count(chr(10)) + 2}: TUNE{message}")


def test_steps_of_one_size_and_values_of_other_types_are_told_apart():
    assert distribution({"randint": [3, 4]}).examples() == [3]
    assert distribution({"randint": [10**40, 10**40 + 3]}).examples() == [10**40, 10**40 + 2, 10**40 + 1]
    options = distribution({"choice": [1, 1.0, True, None, [1]]})
    assert [options.index(value) for value in options.values] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError):
        options.index(2)
