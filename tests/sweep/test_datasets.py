import pickle
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml

from raytrain import Task
from raytrain.config.sections import Config
from raytrain.sweep.datasets import MAX_BYTES, are_the_same_for_all, built_and_pickled

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def task() -> Task:
    return Task(Config.model_validate(yaml.safe_load((CONFIGS / "digits.yaml").read_text())))


def test_data_is_built_anew_where_a_sweep_changes_more_than_how_it_is_optimized():
    assert are_the_same_for_all(["OPTIMIZATION.LR", "OPTIMIZATION.GRAD_NORM_CLIP"])
    for key in ("OPTIMIZATION.BATCH_SIZE_PER_GPU", "DATA_CONFIG.SHIFT", "SEED"):
        assert not are_the_same_for_all(["OPTIMIZATION.LR", key])


def test_each_trial_unpacks_data_of_its_own(task):
    built = {"train": [torch.arange(3), np.arange(2)]}
    datasets, content = built_and_pickled(task, lambda: built)
    assert datasets is built
    first, second = pickle.loads(content), pickle.loads(content)
    first["train"][0][0] = first["train"][1][0] = 7
    assert second["train"][0].tolist() == built["train"][0].tolist() == [0, 1, 2]
    assert second["train"][1].tolist() == built["train"][1].tolist() == [0, 1]


def test_data_that_each_trial_has_to_build_is_not_packed(task):
    large = torch.empty(MAX_BYTES + 1, dtype=torch.uint8)
    for data in ([task], [task.cfg.OPTIMIZATION], lambda: None, large, large.numpy()):
        assert built_and_pickled(task, lambda data=data: {"train": data})[1] is None

    def leaves_something() -> dict:
        task.num_classes = 10
        return {"train": [1]}

    assert built_and_pickled(task, leaves_something)[1] is None
    assert built_and_pickled(task, lambda: {"train": [1]})[1] is not None


class Vocal(Task):
    words: ClassVar[list[str]] = []


def test_data_whose_making_leaves_something_in_the_tasks_class_or_module_is_built_by_each_trial(task, monkeypatch):
    vocal = Vocal(task.cfg)

    def grows() -> dict:
        Vocal.words.append("word")
        return {"train": [1]}

    def names() -> dict:
        monkeypatch.setitem(globals(), "VOCABULARY", ["word"])
        return {"train": [1]}

    assert built_and_pickled(vocal, lambda: {"train": [1]})[1] is not None
    assert built_and_pickled(vocal, grows)[1] is None
    assert built_and_pickled(vocal, names)[1] is None
