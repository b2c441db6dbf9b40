"""What is the first difference of two traces, and what is said of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tasks_to_prove import CountsSteps, HasAQueue, Points, Right

from raytrain.proof.difference import Difference, first_difference
from raytrain.proof.held import Change, changes, held_by
from raytrain.proof.remedies import BEGUN_ANEW, OF_MODES, OF_RANKS, OF_SETS, remedy
from raytrain.proof.ways import KINDS, ways_of

CLASSES = {"task": "MyTask", "model": "Net", "data": "Scans"}


def step(**changed: Any) -> dict[str, Any]:
    batches = [
        {"virtual_worker": v, "epoch": 0, "ids": [4 * v, 4 * v + 1], "fields": {"x": [f"{v}a", f"{v}b"], "scale": "s"}}
        for v in range(2)
    ]
    losses = [{"virtual_worker": v, "loss": float(v + 1).hex()} for v in range(2)]
    gradients = {str(v): {"last.bias": "g", "first.weight": "h"} for v in range(2)}
    return {"batches": batches, "losses": losses, "gradients": gradients, "buffers": {"norm.mean": "m"}, **changed}


def trace() -> dict[str, Any]:
    return {
        "num_samples": 8,
        "classes": CLASSES,
        "steps": {str(number): step() for number in range(1, 5)},
        "held": {mark: {"MyTask.steps": mark, "Scans.size": "8"} for mark in "0124"},
        "weights": {mark: {"last.bias": f"after {mark}"} for mark in "024"},
    }


def test_the_same_is_the_same():
    assert first_difference(trace(), [trace()]) is None


def test_batches_come_before_losses_and_losses_before_gradients_and_these_before_buffers():
    other = trace()
    third = other["steps"]["3"]
    third["buffers"]["norm.mean"] = "another"
    assert first_difference(trace(), [other]) == Difference("buffer", 3, "what the step leaves in norm.mean", [])
    third["gradients"]["1"]["first.weight"] = "another"
    found = first_difference(trace(), [other])
    assert found is not None and found.what.startswith("the gradient of first.weight on virtual worker 1")
    third["losses"][1]["loss"] = (2.5).hex()
    found = first_difference(trace(), [other])
    assert found is not None and found.what == "the loss of virtual worker 1 (2 straight, 2.5 here; samples 4, 5)"
    third["batches"][1]["fields"]["x"][1] = "another"
    found = first_difference(trace(), [other])
    assert found is not None and found.what == "sample 5 of the training split (field 'x', epoch 0)"
    third["batches"][0]["fields"]["scale"] = "another"
    found = first_difference(trace(), [other])
    assert (
        found is not None and found.what == "the batch of samples 0, 1 of the training split (field 'scale', epoch 0)"
    )


def test_steps_come_in_their_order_and_weights_between_them():
    other = trace()
    other["weights"]["2"]["last.bias"] = other["steps"]["3"]["buffers"]["norm.mean"] = "another"
    found = first_difference(trace(), [other])
    assert found is not None and (found.kind, found.step, found.what) == ("weights", 2, "last.bias after step 2")
    other["steps"]["1"]["buffers"]["norm.mean"] = "another"
    found = first_difference(trace(), [other])
    assert found is not None and (found.kind, found.step) == ("buffer", 1)


def test_the_virtual_workers_of_several_processes_are_compared_as_those_of_one():
    ranks = [trace(), trace()]
    for rank, other in enumerate(ranks):
        for each in other["steps"].values():
            each["batches"], each["losses"] = each["batches"][rank : rank + 1], each["losses"][rank : rank + 1]
            each["gradients"] = {str(rank): each["gradients"][str(rank)]}
    assert first_difference(trace(), ranks) is None
    ranks[1]["held"]["1"]["MyTask.steps"] = "0"
    ranks[1]["steps"]["1"]["losses"][0]["loss"] = (3.0).hex()
    found = first_difference(trace(), ranks)
    assert found is not None and found.changes == [Change("MyTask.steps", "1", "0")]


def resumed() -> dict[str, Any]:
    """From step 2 on."""
    other = trace()
    for key, first in (("steps", 3), ("held", 2), ("weights", 2)):
        other[key] = {number: each for number, each in other[key].items() if int(number) >= first}
    return copy.deepcopy(other)


def test_a_resumed_trial_is_compared_from_where_it_begins():
    assert first_difference(trace(), [resumed()]) is None
    other = resumed()
    other["held"]["2"] = {"MyTask.steps": "0", "Scans.size": "-1"}  # and has its size again, once it is told its epoch
    other["steps"]["3"]["losses"][0]["loss"] = (3.0).hex()
    found = first_difference(trace(), [other])
    assert found is not None and (found.step, found.changes) == (3, [Change("MyTask.steps", "2", "0")])


def test_of_a_process_that_waited_for_one_that_failed_nothing_is_told():
    waited = {"failed": "connection closed by peer", "status": 1, "follows": True}
    failed = {"failed": "no boxes", "status": 1, "follows": False}
    assert first_difference(trace(), [waited, failed]) == Difference("failure", 0, "no boxes")


def test_numbers_are_told_before_what_may_only_follow_from_them():
    before = {"T.loss": "#1", "T.names": "list of 2", "T.steps": "3", "T.same": "1"}
    found = changes(before, {"T.loss": "#2", "T.names": "list of 3", "T.steps": "4", "T.same": "1"})
    assert [str(change) for change in found] == [
        "T.steps (3 straight, 4 here)",
        "T.names (list of 2 straight, list of 3 here)",
        "T.loss",
    ]


class Settings(dict[str, Any]):
    """As much of a config as these tasks read."""


def test_what_is_held_is_found_in_task_model_data_set_and_modules():
    task, data = CountsSteps(Settings()), Points()
    model = HasAQueue(Settings()).build_model(data)
    before = held_by(model, task, data)
    task.weight()
    data.x = data.x + 1
    model(torch.ones(4, 4))
    found = [change.name for change in changes(before, held_by(model, task, data))]
    assert found == ["CountsSteps.steps", "QueueAsAnAttribute.queue", "Points.x"]
    assert not any(name.startswith("QueueAsAnAttribute.norm.running") for name in before), "a checkpoint has these"
    assert held_by(Right(Settings()).build_model(data), Right(Settings()), data)["Net.drop.p"] == "0.2"


@pytest.mark.parametrize(
    ("trial", "kind", "change", "asked", "says"),
    [
        ("resumed", "loss", "MyTask.steps", [], "load_state_dict(state) in MyTask"),
        ("resumed", "loss", "Net.queue", [], "register_buffer()"),
        ("resumed", "loss", "Net.norm.training", [], OF_MODES),
        ("resumed", "batch", "Scans.cache", [], "in Scans and set LOADER.WORKERS: 0"),
        ("resumed", "loss", "mytask.COUNT", [], "Hold it in MyTask as self.NAME"),
        ("resumed", "loss", "", [], BEGUN_ANEW),
        ("workers", "loss", "", ["mytask.py:3 (get_rank)"], OF_RANKS),
        ("workers", "loss", "MyTask.calls", [], "Each worker process has its own"),
        ("hash_seed", "batch", "", [], OF_SETS),
    ],
)
def test_the_remedy_is_for_whoever_holds_what_differs(trial, kind, change, asked, says):
    found = Difference(kind, 3, "", [Change(change, "1", "0")] if change else [])
    assert says in remedy(trial, found, CLASSES, asked)


def test_every_kind_of_way_can_be_asked_for():
    assert {way.kind for way in ways_of(3, [])} == set(KINDS)
    assert [way.workers for way in ways_of(8, ["workers"])] == [2, 3]
