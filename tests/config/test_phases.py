"""What is changed in mid-run stands in the config, and nothing else changes."""

import pytest

from raytrain.config.load import dump_config, load_config, values_at, with_overrides, with_phase
from raytrain.config.sections import Config
from raytrain.errors import ConfigError

LR, CLIP, DECAY = "OPTIMIZATION.LR", "OPTIMIZATION.GRAD_NORM_CLIP", "OPTIMIZATION.WEIGHT_DECAY"


def config(*phases):
    optim = {"BATCH_SIZE_PER_GPU": 1, "NUM_EPOCHS": 9, "LR": 0.5, "PHASES": list(phases)}
    return Config.model_validate({"TASK": "a:B", "MODEL": {"WIDTH": 8, "NAME": "1e-3"}, "OPTIMIZATION": optim})


def phases_of(cfg):
    return cfg.to_tree()["OPTIMIZATION"]["PHASES"]


def test_a_phase_sets_what_it_names_and_null_is_a_value(tmp_path):
    cfg = config({"FROM_EPOCH": 2, "GRAD_NORM_CLIP": None}, {"FROM_EPOCH": 4, "LR": 1})
    assert values_at(cfg, 1) == {LR: 0.5, CLIP: 10, DECAY: 0.01}
    assert values_at(cfg, 2) == values_at(cfg, 3) == {LR: 0.5, CLIP: None, DECAY: 0.01}
    assert values_at(cfg, 4) == values_at(cfg, 99) == {LR: 1, CLIP: None, DECAY: 0.01}
    (tmp_path / "x.yaml").write_text(dump_config(cfg))
    read = load_config(tmp_path / "x.yaml")
    assert phases_of(read) == [{"FROM_EPOCH": 2, "GRAD_NORM_CLIP": None}, {"FROM_EPOCH": 4, "LR": 1}]
    assert read == cfg and values_at(read, 4) == values_at(cfg, 4)
    assert phases_of(with_overrides(read, ["OPTIMIZATION.PHASES.1.LR", "2"])) == [
        phases_of(read)[0],
        {**phases_of(read)[1], "LR": 2},
    ]


def test_what_is_changed_becomes_a_phase_in_place_of_those_from_there_on():
    cfg = config({"FROM_EPOCH": 2, "LR": 0.25}, {"FROM_EPOCH": 4, "LR": 1.0}, {"FROM_EPOCH": 6, "LR": 2.0})
    found = with_phase(cfg, 4, {LR: 0.25, CLIP: 3, "MODEL.WIDTH": 8, "MODEL.NAME": "1e-3"})
    assert phases_of(found) == [{"FROM_EPOCH": 2, "LR": 0.25}, {"FROM_EPOCH": 4, "GRAD_NORM_CLIP": 3}]
    assert phases_of(with_phase(cfg, 4, {LR: 0.25})) == [{"FROM_EPOCH": 2, "LR": 0.25}]
    assert with_phase(found, 9, {CLIP: None}).OPTIMIZATION.in_force(9).GRAD_NORM_CLIP is None


def test_before_anything_is_trained_any_key_takes_its_value_in_place():
    found = with_phase(config({"FROM_EPOCH": 2, "LR": 0.25}), 0, {LR: 1, CLIP: None, "MODEL.NAME": "2", "MODEL.A.B": 1})
    assert (values_at(found, 5), phases_of(found)) == ({LR: 1, CLIP: None, DECAY: 0.01}, [])
    assert found.MODEL == {"WIDTH": 8, "NAME": "2", "A": {"B": 1}}


def test_what_no_phase_can_hold_does_not_change_in_mid_run():
    with pytest.raises(ConfigError, match=r"after epoch 3, in mid-run, MODEL.WIDTH cannot change; what can: OPTIM"):
        with_phase(config(), 3, {LR: 1, "MODEL.WIDTH": 9})
    with pytest.raises(ConfigError, match=r"OPTIMIZATION.PHASES.0.LR is -1, but it must be a number > 0"):
        with_phase(config(), 3, {LR: -1})
