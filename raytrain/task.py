"""What users write: a Task says what is trained; raytrain says how."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain.errors import TaskError, users_traceback
from raytrain.progress import TaskProgress

if TYPE_CHECKING:
    import torch

    from raytrain.config.sections import Config


@dataclasses.dataclass
class ModelReturn:
    """What one forward pass gives.

    loss:      scalar tensor (a tensor of several values is averaged)
    tb_dict:   name -> scalar (tensor or number), journalled as `terms` and drawn as train/<name>
    disp_dict: name -> scalar, shown on the live line
    weight:    how many things (tokens, boxes, valid pixels) the loss is the mean of, a number or a tensor of one. The
               step's loss, gradient, tb_dict and disp_dict are then means over the things of all its micro-batches;
               without it over samples
    """

    loss: torch.Tensor
    tb_dict: dict[str, Any] = dataclasses.field(default_factory=dict)
    disp_dict: dict[str, Any] = dataclasses.field(default_factory=dict)
    weight: Any = None


class Task:
    """Base of all tasks. `build_dataset`, `build_model` and `model_func` must be written.

    random_samples: False promises that no sample draws random numbers (no augmentation); then nothing
    is seeded around each `__getitem__`, which takes 10 us a sample. The promise is checked once an epoch.

    eval_needs_grad: True has gradients recorded in evaluation too, for a loss or a prediction that is one
    (forces, PINNs, test-time optimisation)
    """

    random_samples = True
    eval_needs_grad = False

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    @property
    def progress(self) -> TaskProgress:
        """Where the run stands: epoch, step, and the share of the run that is done.

        In collate that of the batch that is made, in whatever process, however far ahead; in model_func that of the
        batch at hand; in predict and score that of the weights.
        """
        progress = vars(self).get("_progress")
        if not isinstance(progress, TaskProgress):
            raise TaskError(
                f"{type(self).__name__}.progress was read before the first batch; where the run goes on is not known "
                "yet. Read it in collate, model_func, predict or score"
            )
        return progress

    @progress.setter
    def progress(self, value: Any) -> None:
        raise TaskError(
            f"{type(self).__name__} sets self.progress, which raytrain gives to tasks: epoch, step and share of the "
            "run. Give yours another name"
        )

    def take_progress(self, progress: TaskProgress) -> None:
        """What `self.progress` is from now on."""
        vars(self)["_progress"] = progress

    def build_dataset(self, split: str) -> Any:
        """The map-style data set (`__len__`, `__getitem__`) of split "train" or "val".

        None for "val" means that there is nothing to evaluate on. Loader workers receive it
        by pickle. If it has `set_epoch(epoch)`, that is called, in the process that loads,
        before the first sample of each epoch.
        """
        raise TaskError(f"{type(self).__name__}.build_dataset(split) must be written; raytrain has no default for it")

    def build_model(self, dataset: Any) -> torch.nn.Module:
        """The model, on the CPU; `dataset` is the training split."""
        raise TaskError(f"{type(self).__name__}.build_model(dataset) must be written; raytrain has no default for it")

    def model_func(self, model: torch.nn.Module, batch: Any) -> ModelReturn:
        """One forward pass and its loss."""
        raise TaskError(
            f"{type(self).__name__}.model_func(model, batch) must be written; raytrain has no default for it"
        )

    def collate(self, samples: list[Any]) -> Any:
        """One batch of a list of samples; torch's default_collate unless overridden."""
        from torch.utils.data import default_collate

        return default_collate(samples)

    def to_device(self, batch: Any, device: torch.device) -> Any:
        """The batch with every tensor on `device`, copied without blocking."""
        from raytrain.batch import move_to  # which imports torch

        return move_to(batch, device)

    def predict(self, model: torch.nn.Module, batch: Any) -> Any:
        """Predictions of one batch: a list or tensor with one entry for each sample, in order.

        Not overridden: evaluation reports the mean loss of `model_func` over the split.
        """
        raise NotImplementedError

    def score(self, predictions: list[Any], dataset: Any) -> dict[str, float]:
        """Metrics of all predictions, which come in the order of `dataset`."""
        raise TaskError(
            f"{type(self).__name__} has predict(model, batch) but no score(predictions, dataset); "
            "write it to give a dict of name -> number"
        )

    def pictures(self, predictions: list[Any], dataset: Any, count: int) -> Iterator[tuple[str, bytes]]:
        """Name and PNG bytes of each picture, of `count` samples of the validation split; none unless overridden.

        predictions: of the first samples of `dataset`, or of all, in order; [] where there is no predict or no
                     checkpoint yet: then what is drawn is the data
        Asked for by `raytrain eval`, `raytrain view` and, on rank 0, after the first evaluation of a run and the last
        (EVAL.PICTURES).
        """
        return iter(())

    def note(self, text: str) -> None:
        """Tell the user something, once, in the journal and on the screen: a score with little behind it, say."""
        notes = vars(self).setdefault("_notes", {})  # made here: a task need not call our __init__
        notes.setdefault(str(text), False)  # whatever print() would take

    def take_notes(self) -> list[str]:
        """What `note` was given since this was last asked."""
        notes = vars(self).get("_notes")
        if not notes:
            return []
        taken = [text for text, was_taken in notes.items() if not was_taken]
        notes.update(dict.fromkeys(taken, True))
        return taken

    def has_predict(self) -> bool:
        return type(self).predict is not Task.predict

    def has_pictures(self) -> bool:
        return type(self).pictures is not Task.pictures


def make_task(cfg: Config) -> Task:
    """The task of a config, ready to build its data sets and model."""
    task_class = load_task_class(cfg.TASK)
    try:
        inspect.signature(task_class).bind(cfg)
    except TypeError as error:
        raise TaskError(
            f"TASK {cfg.TASK!r}: {task_class.__name__}.__init__ cannot be called with the config alone ({error}); "
            "write it as def __init__(self, cfg)"
        ) from error
    return task_class(cfg)


def load_task_class(path: str) -> type[Task]:
    """The Task class that a dotted path `pkg.module:Class` names.

    The current folder is searched too, so that a file beside the YAML's command works.
    """
    module_name, colon, class_name = path.partition(":")
    if not colon or not module_name or not class_name:
        raise TaskError(f"TASK is {path!r}; write it as pkg.module:Class, for example raytrain.tasks.digits:DigitsTask")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise TaskError(
                f"TASK {path!r}: there is no module {error.name!r}; searched: the current folder {here}, PYTHONPATH "
                "and the installed packages"
            ) from error
        message = f"TASK {path!r}: importing {module_name!r} failed: {type(error).__name__}: {error}"
        raise TaskError(f"{message}\n\n{users_traceback(error)}") from error
    task_class = getattr(module, class_name, None)
    if task_class is None:
        known = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Task) and v is not Task]
        raise TaskError(
            f"TASK {path!r}: {module.__file__} has no {class_name!r}; its tasks are {', '.join(known) or 'none'}"
        )
    if not (isinstance(task_class, type) and issubclass(task_class, Task)):
        raise TaskError(
            f"TASK {path!r}: {class_name} is no subclass of raytrain.Task; write class {class_name}(raytrain.Task)"
        )
    return task_class
