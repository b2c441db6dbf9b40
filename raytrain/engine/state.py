"""The state of one run: all that changes while it trains, how it is built, saved and restored."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from raytrain import __version__
from raytrain.batch import channels_last, tensors_of
from raytrain.engine.compilation import Compilation, open_compilation
from raytrain.engine.engine import Engine
from raytrain.engine.hardware import hardware_here
from raytrain.engine.modes import TrainingMode
from raytrain.engine.optim import in_full_groups
from raytrain.engine.own_state import OwnState
from raytrain.engine.pretrained import in_todays_layout, renaming
from raytrain.engine.randomness import Randomness, seed_all
from raytrain.engine.schedule import Schedule, build_schedule
from raytrain.engine.world import World
from raytrain.errors import CheckpointError, TaskError, listed
from raytrain.progress import Plan, Progress
from raytrain.storage.checkpoint import Manifest
from raytrain.task import Task

TENSOR_BYTES = 1024  # about what a checkpoint.pth holds of a tensor besides its values: names, place, alignment


@dataclasses.dataclass
class RunState:
    """What a checkpoint restores (model, engine, progress, best) and what is fixed for the run.

    best:        {"epoch", "step", "metrics"} of the best evaluation so far, by CHECKPOINT.METRIC
    metrics:     of the newest evaluation
    unevaluated: the checkpoint that the run stands at, if its evaluation is still owed
    built:       what the task gave, in short, as training/sameness.py has it; a checkpoint's manifest holds it
    compilation: where OPTIMIZATION.COMPILE asks for it
    own:         what the task and its data sets hold besides the model
    randomness:  what a step or a prediction may draw from: what task and model own is seeded as the global ones are
    source:      of the task's code, as in Manifest
    """

    model: torch.nn.Module
    mode: TrainingMode
    engine: Engine
    schedule: Schedule
    plan: Plan
    world: World
    config: dict[str, Any]
    progress: Progress = dataclasses.field(default_factory=Progress)
    best: dict[str, Any] | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    unevaluated: str | None = None
    compilation: Compilation | None = None
    built: dict[str, Any] = dataclasses.field(default_factory=dict)
    own: OwnState = dataclasses.field(default_factory=lambda: OwnState({}))
    randomness: Randomness = dataclasses.field(default_factory=Randomness)
    source: dict[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def hardware(self) -> dict[str, str]:
        """What rounds in this process."""
        return hardware_here(self.world.device)

    @property
    def seed(self) -> int:
        return int(self.config["SEED"])


def build_run(cfg: Any, task: Task, train_set: Any, plan: Plan, world: World) -> RunState:
    """A run at step 0: the same weights on every process and for every number of them."""
    seed_all(cfg.SEED, "model")
    model = task.build_model(train_set)
    if not isinstance(model, torch.nn.Module):
        given = f"the class {model.__name__} itself" if isinstance(model, type) else type(model).__name__
        raise TaskError(f"{type(task).__name__}.build_model(dataset) gave {given}; it must give a torch.nn.Module")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise TaskError(
            f"{type(task).__name__}.build_model(dataset) gave a model whose parameters have no shape yet "
            f"({', '.join(lazy[:5])}); send one batch through its lazy layers before you return it"
        )
    if cfg.OPTIMIZATION.SYNC_BN and world.size > 1:
        model = synchronised_batchnorm(model, world)
    model = model.to(world.device)
    if cfg.OPTIMIZATION.CHANNELS_LAST:  # before the engine, whose buffers keep the strides
        for param in model.parameters():  # not model.to(memory_format=...), which refuses models with a Conv3d
            param.data = channels_last(param.data)
    engine = Engine(model, cfg.OPTIMIZATION, world, cfg.SCALE.REDUCTION, is_exact=cfg.SCALE.EXACT is not False)
    engine.guard.limit = min(engine.guard.limit, plan.total_steps)  # a run without one good step has failed
    schedule = build_schedule(cfg.OPTIMIZATION, plan.steps_per_epoch, plan.num_epochs)
    mode, randomness = TrainingMode(model), Randomness(task=task, model=model)
    return RunState(model, mode, engine, schedule, plan, world, cfg.to_tree(), randomness=randomness)


def compile_model(run: RunState, optim_cfg: Any) -> list[str]:
    """Have the model compiled if OPTIMIZATION.COMPILE asks for it; a line for each thing that cannot be."""
    if not optim_cfg.COMPILE:
        return []
    micro_batches = len(run.world.block) * run.plan.accumulate
    run.compilation, notes = open_compilation(run.model, optim_cfg, run.world, micro_batches)
    return notes


def synchronised_batchnorm(model: torch.nn.Module, world: World) -> torch.nn.Module:
    """`model` with BatchNorm over the samples of all workers (heritage: --sync_bn)."""
    if world.size != world.virtual_workers:
        raise TaskError(
            f"OPTIMIZATION.SYNC_BN needs one worker process for each virtual worker; this run has "
            f"{world.virtual_workers} virtual workers on {world.size} processes"
        )
    if world.device.type == "cuda":
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    from raytrain.engine.sync_bn import convert_to_host_sync_batchnorm

    return convert_to_host_sync_batchnorm(model)


def manifest_of(run: RunState, metrics: dict[str, float | None] | None) -> Manifest:
    """What a checkpoint of this moment says of itself; metrics are None until the evaluation is done."""
    plan = run.plan
    world = {
        "num_workers": run.world.size,
        "virtual_workers": plan.virtual_workers,
        "num_samples": plan.num_samples,
        "batch_size": plan.batch_size,
        "accumulate": plan.accumulate,
        "last": plan.last,
        **run.engine.arithmetic,
        "hardware": run.hardware,
        **({"built": run.built} if run.built else {}),
    }
    return Manifest(run.progress, run.config, world, run.seed, metrics, source=run.source)


def payload_of(run: RunState) -> dict[str, Any]:
    """What checkpoint.pth holds: OpenPCDet's keys, and under `raytrain` what they lack. Tensors are the living ones."""
    return {
        "epoch": run.progress.epoch,
        "it": run.progress.step,
        "model_state": dict(run.model.state_dict()),
        "optimizer_state": run.engine.optimizer_state(live=True),
        "version": f"raytrain+{__version__}",
        "raytrain": {
            "progress": dataclasses.asdict(run.progress),
            "scaler": run.engine.precision.state_dict(),
            "guard": run.engine.guard.state(),
            "parameters": run.engine.stepped_names,  # of the numbers in optimizer_state
            "best": run.best,
            "own": run.own.save(),
            "changed_by_forward": {"names": run.engine.buffers.parameters, "looks_left": run.engine.buffers.looks_left},
            # All randomness is drawn from (seed, epoch, sample) or (seed, step, virtual worker):
            # with the seed and the progress, the random state is restored whole.
            "seed": run.seed,
        },
    }


def size_to_come(run: RunState) -> int:
    """Bytes of the run's checkpoint.pth once every parameter was stepped, roughly: only then are all moments there."""
    tensors = [*run.model.parameters(), *run.model.buffers(), *run.engine.params * run.engine.num_moments]
    tensors += tensors_of(run.own.save())
    copies = 1 if run.engine.guard.rollback_every is None else 2  # with the state that a rollback goes back to
    return copies * sum(tensor.numel() * tensor.element_size() + TENSOR_BYTES for tensor in tensors)


def restore(run: RunState, payload: dict[str, Any], where: str) -> list[str]:
    """Bring `run` to the state of a payload of ours; what a user should know, a line each."""
    load_model_state(run.model, payload["model_state"], where)
    run.engine.load_optimizer_state(payload["optimizer_state"])
    extra = payload["raytrain"]
    run.engine.precision.load_state_dict(extra["scaler"])
    run.engine.load_guard(extra.get("guard", {}))
    if "changed_by_forward" in extra:  # an older one does not say it: then it is found out anew
        run.engine.follow_parameters(**extra["changed_by_forward"])
    run.progress = Progress(**extra["progress"])
    run.best = extra["best"]
    return run.own.load(extra.get("own", {}), where)


def restore_heritage(run: RunState, payload: dict[str, Any], where: str) -> list[str]:
    """Bring `run` to the state of an OpenPCDet .pth; returns what could not be taken over, a line each."""
    notes, turned = load_heritage_model(run.model, payload, where)
    if turned:
        notes.append("moments start at zero: they lie as spconv 1 has them")
    elif payload.get("optimizer_state") is not None:
        optim_cfg, moments, new = run.config["OPTIMIZATION"], payload["optimizer_state"], 0
        if not optim_cfg["LEGACY_PARAM_GROUPS"]:
            moments, new = in_full_groups(moments, run.model, optim_cfg["OPTIMIZER"])
        run.engine.load_optimizer_state(moments)
        if new:
            notes.append(
                f"{new} parameters that OpenPCDet leaves out of its groups are trained from here on; "
                "OPTIMIZATION.LEGACY_PARAM_GROUPS: true leaves them out as it did"
            )
    else:
        notes.append("it holds no optimizer state: moments start at zero")
    step, epoch = int(payload.get("it") or 0), int(payload.get("epoch") or 0)
    per_epoch = run.plan.steps_per_epoch
    if epoch * per_epoch <= step <= (epoch + 1) * per_epoch:
        # One written in the last iteration of an epoch belongs to the start of the next: OpenPCDet repeats the epoch.
        run.progress = Progress(step // per_epoch, step % per_epoch * run.plan.samples_per_step, step)
    else:
        run.progress = Progress(epoch, 0, epoch * per_epoch)
        notes.append(
            f"its {step} iterations are not {epoch} epochs of {per_epoch} steps (another batch size or data set): "
            f"continuing at the start of epoch {epoch + 1}, step {run.progress.step}"
        )
    return notes


def load_heritage_model(model: torch.nn.Module, payload: dict[str, Any], where: str) -> tuple[list[str], list[str]]:
    """Bring a model to the weights of an OpenPCDet .pth; what a user should know, and which weights are of spconv 1."""
    own, given = model.state_dict(), payload["model_state"]
    rename, how = renaming(given, own)
    state = {rename(name): value for name, value in given.items()}
    state, turned = in_todays_layout(model, {k: v for k, v in state.items() if k != "global_step" or k in own})
    notes = [f"names of its weights are taken {how}"] if how else []
    if "global_step" in own and "global_step" not in state:
        state["global_step"] = torch.full_like(own["global_step"], int(payload.get("it") or 0))
        notes.append("it holds no global_step: that is its number of iterations")
    load_model_state(model, state, where)
    if turned:
        notes.append(f"{len(turned)} weights are turned from spconv 1's layout: {listed(turned)}")
    return notes, turned


def load_model_state(model: torch.nn.Module, state: dict[str, Any], where: str) -> None:
    """Strictly, with every difference named."""
    own = model.state_dict()
    wrong = [f"missing {k}" for k in own if k not in state]
    wrong += [f"unknown {k}" for k in state if k not in own]
    wrong += [
        f"{k} has shape {shape_of(state[k])}, the model {shape_of(own[k])}"
        for k in own
        if k in state and shape_of(own[k]) != shape_of(state[k])
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: its model_state does not fit this model: {listed(wrong, 10, '; ')}. "
            "To start from the weights that do fit, use --pretrained_model"
        )
    model.load_state_dict(state)


def shape_of(value: Any) -> tuple[int, ...] | None:
    """None for what is no tensor: the extra state of a module."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
