"""Which modules train, and which stay in eval mode as build_model left them: a teacher, a backbone's BatchNorm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from raytrain.errors import listed


class TrainingMode:
    """The mode of `model` while it trains: train(), but for the parts that were in eval mode when this was made.

    A model that is in eval mode as a whole has no such part, as nobody has singled one out: from_pretrained() of
    Hugging Face and others gives all models so.

    notes: what a user should know of it, a line each
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_modules())
        self._model = model
        self._kept: list[nn.Module] = []
        self._begun: list[bool] = []
        self.notes: list[str] = []
        if not any(module.training for _, module in named):
            self.notes.append(
                "build_model gave the model in eval mode as a whole: it trains in training mode. Give it in training "
                "mode with only those parts in eval mode that shall stay so"
            )
            return
        # The model's own flag says whether this is training, to its forward and to model_func.
        kept = {name: module for name, module in named if module is not model and not module.training}
        self._kept = list(kept.values())
        if kept:
            self.notes.append(note_of(list(kept), model))

    def begin(self) -> None:
        """From now on the model trains."""
        self._model.train()
        for module in self._kept:
            module.training = False  # not eval(): a part of it may be in training mode
        self._begun = [module.training for module in self._model.modules()]

    def changed(self) -> list[str]:
        """Names of the modules that are in another mode than `begin` has left them in."""
        named = list(self._model.named_modules())
        if len(named) != len(self._begun):  # before the first epoch; or the model has got other modules
            return []
        return [name for (name, module), mode in zip(named, self._begun, strict=True) if module.training is not mode]


def note_of(names: Sequence[str], model: nn.Module) -> str:
    """The line that names what stays in eval mode, and what of it has parameters that train all the same."""
    tops = outermost(names)
    trained = [name for name in tops if any(p.requires_grad for p in model.get_submodule(name).parameters())]
    note = f"in eval mode, as build_model left them, also while training: {listed(tops)}"
    if trained:
        note += (
            f". Parameters of {listed(trained)} are trained; if dropout and BatchNorm shall train there too, call "
            ".train() on it in build_model"
        )
    return note


def outermost(names: Sequence[str]) -> list[str]:
    """Those of `names` of modules that lie in no other of them."""
    known = set(names)
    return [name for name in names if not any(above in known for above in ancestors(name))]


def ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]
