"""What steps show of a task that its author may not know, told in a line each: asked after an epoch's first step."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from raytrain.engine.determinism import torch_differences
from raytrain.engine.modes import outermost
from raytrain.engine.object_graph import walk
from raytrain.engine.state import RunState
from raytrain.errors import listed
from raytrain.task import Task

WITHIN_MODULE = re.compile(r"\._(?:parameters|modules)\['(\w+)'\]")


class StepChecks:
    """The lines of one run on this process."""

    def __init__(self, run: RunState, task: Task) -> None:
        self._run, self._task = run, task
        self._other_mode: Sequence[str] = ()
        self._has_stepped = False
        self._frozen: set[str] = set()

    def epoch_done(self) -> None:
        """Before anything else sets the model to another mode."""
        self._other_mode = self._run.mode.changed()

    def first_step_done(self) -> list[str]:
        """Of an epoch, or of what is left of it; what does not change is asked once."""
        notes = mode_lost(self._other_mode, self._run)
        if not self._has_stepped:
            self._has_stepped = True
            notes += unregistered(self._run, self._task) + reseeded(self._run) + redrawn(self._run)
            notes += torch_changed(self._run)
        newly_frozen = [name for name in frozen(self._run) if name not in self._frozen]
        self._frozen |= set(newly_frozen)
        if newly_frozen:
            notes.append(
                f"frozen since training began: {listed(newly_frozen)}. A resume begins with what build_model left "
                "trainable: freeze in build_model, or by self.progress whenever model_func is called"
            )
        return [*untrained(self._run), *unseeded(self._run), *notes]


def untrained(run: RunState) -> list[str]:
    """A line for the user if the model has got trainable parameters that no step changes."""
    names = run.engine.newly_untrained()
    if not names:
        return []
    return [
        f"not trained, since they came or were unfrozen after training began: {listed(names)}. "
        "Make them, trainable, in build_model"
    ]


def frozen(run: RunState) -> list[str]:
    """Names of parameters that were trainable when training began, and are not now."""
    began = {id(param) for param in run.engine.trainable}
    named = run.model.named_parameters()
    return [name for name, param in named if id(param) in began and not param.requires_grad]


def unregistered(run: RunState, task: Task) -> list[str]:
    """A line for the user if a tensor that task or model hold has got a gradient, and is no parameter of the model.

    A loss with weights of its own that the task holds, layers in a plain list.
    """
    own = {id(param) for param in run.model.parameters()}
    roots = {type(task).__name__: task, type(run.model).__name__: run.model}
    found = [
        WITHIN_MODULE.sub(r".\1", path)
        for path, value in walk(roots)
        if isinstance(value, torch.Tensor) and id(value) not in own and value.is_leaf and value.grad is not None
    ]
    if not found:
        return []
    return [
        "gets gradients but is no parameter of the model that build_model gave, so no step trains it, workers do not "
        f"share it, and no checkpoint holds it: {listed(found)}. Make it a part of the model (an attribute of a "
        "module; layers in nn.ModuleList, not in a list)"
    ]


def unseeded(run: RunState) -> list[str]:
    """A line for the user if task or model have got a generator that was not there when training began."""
    names = run.randomness.find()
    if not names:
        return []
    return [
        f"{', '.join(names)} came while training, so what was drawn from there until now was not seeded by step: "
        "a resume draws other numbers. Make generators in __init__ or build_model"
    ]


def reseeded(run: RunState) -> list[str]:
    """A line for the user if the task has seeded torch while the step was computed."""
    if not run.randomness.is_reseeded():
        return []
    return [
        "torch.manual_seed is called while a step is computed, so what is drawn from there on (dropout) is the same in "
        "each step. Give a torch.Generator of its own to what shall be the same"
    ]


def redrawn(run: RunState) -> list[str]:
    """A line for the user if the backward pass draws: a part that is computed again there does so with other noise."""
    if not run.engine.backward_draws:
        return []
    return [
        "random numbers are drawn while gradients are computed. If that is torch.utils.checkpoint with "
        "preserve_rng_state=False, dropout keeps other values there than it did in the forward pass, and the gradients "
        "are not those of the loss: leave preserve_rng_state at True"
    ]


def torch_changed(run: RunState) -> list[str]:
    """A line for the user if the task has set torch to what changes the rounding of sums."""
    changed = torch_differences(run.config["SCALE"]["THREADS"], run.world.device)
    return [f"{'; '.join(changed)}. Runs give the same bits only where that is the same"] if changed else []


def mode_lost(other_mode: Sequence[str], run: RunState) -> list[str]:
    """A line for the user if modules were in another mode when an epoch was done than after the next one's first step.

    other_mode: those that were not in the mode that the epoch began with
    """
    still = set(run.mode.changed())
    lost = [name for name in other_mode if name not in still]
    if not lost:
        return []
    tops = listed(outermost([name for name in lost if name]) or [type(run.model).__name__])
    return [
        f"train() or eval() was called for {tops} while an epoch was trained, once: each epoch, and a resume, begins "
        "with the mode that build_model left. Call it in build_model, or whenever model_func is called"
    ]
