"""The schedules are OpenPCDet's: tests/golden/schedules.json holds what its own code gives."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from raytrain.config.sections import Optimization
from raytrain.engine.schedule import build_schedule
from raytrain.errors import ConfigError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "schedules.json").read_text())
EXACT = 1e-15  # relative


def optim_cfg(**changes):
    defaults = {
        "OPTIMIZER": "adam_onecycle",
        "SCHEDULER": None,
        "LR": 0.01,
        "MOMS": [0.95, 0.85],
        "PCT_START": 0.4,
        "DIV_FACTOR": 10,
        "DECAY_STEP_LIST": [],
        "LR_DECAY": 0.1,
        "LR_CLIP": 1e-7,
        "LR_WARMUP": False,
        "WARMUP_EPOCH": 1,
        "WARMUP_ITER": 500,
        "GRAD_NORM_CLIP": 10,
        "WEIGHT_DECAY": 0.01,
        "PHASES": [],
    }
    return SimpleNamespace(**{**defaults, **changes})


def tables(kind):
    """Records of one kind of schedule, each with the OPTIMIZATION that asks for it."""
    records = [record for record in GOLDEN if record["kind"].startswith(kind)]
    assert records
    return [(record, {key: value for key, value in record.items() if key.isupper()}) for record in records]


@pytest.mark.parametrize(("table", "changes"), tables("adam_onecycle"))
def test_onecycle_is_the_heritages(table, changes):
    schedule = build_schedule(optim_cfg(**changes), table["total_step"], 1)
    for step, lr, momentum in table["rows_step_lr_mom"]:
        assert schedule.at(step).lr == pytest.approx(lr, rel=EXACT, abs=0)
        assert schedule.at(step).momentum == pytest.approx(momentum, rel=EXACT, abs=0)


@pytest.mark.parametrize(("table", "changes"), tables("adam_cosineanneal"))
def test_cosine_is_the_heritages(table, changes):
    cfg = optim_cfg(OPTIMIZER="adam_cosineanneal", **changes)
    schedule = build_schedule(cfg, table["iters_per_epoch"], table["total_epoch"])
    for step, _, lr, momentum in table["rows_step_epoch_lr_mom"]:
        assert schedule.at(step).lr == pytest.approx(lr, rel=EXACT, abs=0)
        assert schedule.at(step).momentum == pytest.approx(momentum, rel=EXACT, abs=0)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adamw"])
@pytest.mark.parametrize(("table", "changes"), tables("adam|sgd LambdaLR"))
def test_step_decay_is_the_heritages_at_every_step(table, changes, optimizer):
    schedule = build_schedule(optim_cfg(OPTIMIZER=optimizer, **changes), table["iters_per_epoch"], table["epochs"])
    first_steps = dict(map(tuple, table["rows_first_step_with_lr"]))
    expected = None
    for step in range(table["iters_per_epoch"] * table["epochs"]):
        expected = first_steps.get(step, expected)
        assert schedule.at(step).lr == pytest.approx(expected, rel=EXACT, abs=0)
        assert schedule.at(step).momentum is None


@pytest.mark.parametrize(("table", "changes"), tables("CosineWarmupLR"))
def test_warmup_is_what_the_heritage_meant(table, changes):
    cfg = optim_cfg(OPTIMIZER="sgd", LR_WARMUP=True, WARMUP_EPOCH=1, **changes)
    schedule = build_schedule(cfg, table["T_max"], 3)
    for step, lr in table["rows_step_lr"]:
        assert schedule.at(0 if step == "after_construction" else step).lr == pytest.approx(lr, rel=EXACT, abs=0)


def test_after_the_warmup_the_main_schedule_goes_on_where_it_would_be_without():
    changes = {"OPTIMIZER": "sgd", "DECAY_STEP_LIST": [1, 3], "WARMUP_EPOCH": 2}
    warmed_up = build_schedule(optim_cfg(LR_WARMUP=True, **changes), 5, 4)
    plain = build_schedule(optim_cfg(LR_WARMUP=False, **changes), 5, 4)
    rises = [warmed_up.at(step).lr for step in range(10)]
    assert rises == sorted(rises)
    assert rises[0] == 0.001
    assert rises[-1] < 0.01
    assert [warmed_up.at(step).lr for step in range(10, 20)] == [plain.at(step).lr for step in range(10, 20)]


def test_a_warmup_of_no_epochs_is_none():
    schedule = build_schedule(optim_cfg(SCHEDULER="constant", LR_WARMUP=True, WARMUP_EPOCH=0), 5, 4)
    assert {schedule.at(step).lr for step in range(20)} == {0.01}


@pytest.mark.parametrize("scheduler", ["onecycle", "cosine"])
def test_schedules_with_their_own_warmup_ignore_lr_warmup_as_in_the_heritage(scheduler):
    warmed_up = build_schedule(optim_cfg(SCHEDULER=scheduler, LR_WARMUP=True), 5, 4)
    plain = build_schedule(optim_cfg(SCHEDULER=scheduler), 5, 4)
    assert [warmed_up.at(step).lr for step in range(20)] == [plain.at(step).lr for step in range(20)]


@pytest.mark.parametrize("total_steps", [1, 2])
def test_a_run_too_short_to_rise_starts_at_the_peak(total_steps):
    schedule = build_schedule(optim_cfg(), total_steps, 1)
    assert schedule.at(0).lr == pytest.approx(0.01)
    assert schedule.at(0).momentum == pytest.approx(0.85)
    assert schedule.at(total_steps).lr == pytest.approx(1e-7)


def test_the_epochs_of_a_onecycle_run_make_one_cycle():
    assert build_schedule(optim_cfg(), 7, 3).at(10).lr == build_schedule(optim_cfg(), 21, 1).at(10).lr


def test_constant_is_lr_and_leaves_the_momentum_alone():
    schedule = build_schedule(optim_cfg(SCHEDULER="constant"), 5, 4)
    assert {schedule.at(step).lr for step in range(25)} == {0.01}
    assert schedule.at(3).momentum is None


def test_scheduler_overrules_the_optimizers_own():
    assert build_schedule(optim_cfg(OPTIMIZER="sgd", SCHEDULER="onecycle"), 7, 3).at(0).momentum == 0.95
    assert build_schedule(optim_cfg(OPTIMIZER="adam_onecycle", SCHEDULER="step"), 7, 3).at(0).momentum is None


def test_a_cosine_without_warmup_starts_at_lr():
    assert build_schedule(optim_cfg(SCHEDULER="cosine", WARMUP_ITER=0), 7, 3).at(0).lr == pytest.approx(0.01)


@pytest.mark.parametrize("scheduler", ["onecycle", "cosine", "step", "constant"])
def test_every_value_is_a_python_float_even_of_whole_numbers(scheduler):
    cfg = optim_cfg(SCHEDULER=scheduler, LR=1, MOMS=[1, 0], LR_CLIP=1, LR_DECAY=1, WARMUP_ITER=3, LR_WARMUP=True)
    schedule = build_schedule(cfg, 5, 2)
    assert {type(schedule.at(step).lr) for step in range(10)} == {float}
    assert {type(schedule.at(step).momentum) for step in range(10)} <= {float, type(None)}


@pytest.mark.parametrize("scheduler", ["onecycle", "cosine", "step", "constant"])
def test_a_schedule_survives_pickling(scheduler):
    schedule = build_schedule(optim_cfg(SCHEDULER=scheduler, LR_WARMUP=True), 5, 4)
    copy = pickle.loads(pickle.dumps(schedule))
    assert [copy.at(step) for step in range(20)] == [schedule.at(step) for step in range(20)]


@pytest.mark.parametrize("scheduler", ["onecycle", "cosine", "step", "constant"])
def test_a_phases_values_hold_from_its_first_step_on_as_if_they_had_from_the_start(scheduler):
    def schedule_of(**changes):
        section = {"BATCH_SIZE_PER_GPU": 1, "NUM_EPOCHS": 6, "SCHEDULER": scheduler, "DECAY_STEP_LIST": [3], **changes}
        return build_schedule(Optimization.model_validate(section), 5, 6)

    phases = [
        {"FROM_EPOCH": 1, "LR": 0.5, "GRAD_NORM_CLIP": None},
        {"FROM_EPOCH": 4, "WEIGHT_DECAY": 0, "GRAD_NORM_CLIP": 2},
        {"FROM_EPOCH": 9, "LR": 7},  # of a run that may be extended
    ]
    found = schedule_of(PHASES=phases)
    first = schedule_of()
    second = schedule_of(LR=0.5, GRAD_NORM_CLIP=None)
    third = schedule_of(LR=0.5, GRAD_NORM_CLIP=2, WEIGHT_DECAY=0)
    expected = [(first, second, third)[(step >= 5) + (step >= 20)].at(step) for step in range(30)]
    assert [found.at(step) for step in range(30)] == expected
    assert {(each.clip, each.weight_decay) for each in expected} == {(10, 0.01), (None, 0.01), (2, 0)}


def test_an_unknown_scheduler_or_optimizer_is_refused_with_the_legal_ones():
    with pytest.raises(ConfigError, match=r"'linear'.*onecycle, cosine"):
        build_schedule(optim_cfg(SCHEDULER="linear"), 5, 4)
    with pytest.raises(ConfigError, match=r"'lion'.*adam_cosineanneal"):
        build_schedule(optim_cfg(OPTIMIZER="lion"), 5, 4)
