"""A step whose numbers are bad leaves no trace: the run is, to the bit, the one that never took it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optimization import OPTIMIZATION, settings
from processes import Pair
from small_runs import Kept, config
from torch import nn

from raytrain.data.feed import Feed
from raytrain.engine.engine import Engine, Stepped
from raytrain.engine.guard import BadStep, Guard
from raytrain.engine.optim import optimizer_options, stepped_groups
from raytrain.engine.per_parameter import TorchStepper
from raytrain.engine.state import RunState, build_run
from raytrain.engine.world import World
from raytrain.journal.journal import Journal
from raytrain.journal.run_folder import RunFolder
from raytrain.keeper.checkpointer import Checkpointer
from raytrain.keeper.heartbeat import Heartbeat
from raytrain.storage.store import Store
from raytrain.task import load_task_class
from raytrain.training import loop
from raytrain.training.bad_steps import culprits, described
from raytrain.training.control import Control
from raytrain.training.recorder import Recorder
from raytrain.training.worker import build_datasets, plan_of

OPTIM = {**OPTIMIZATION, "LR": 0.02, "OPTIMIZER": "adamw"}
NAN = math.nan


class Net(nn.Module):
    """BatchNorm, a buffer that counts, an f64 parameter, and a branch for some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 3)
        self.branch = nn.Linear(3, 3)
        self.fine = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, branch: bool = True) -> torch.Tensor:
        self.passes += 1
        x = self.linear(self.norm(x))
        return ((self.branch(x) if branch else x) * self.fine).square().mean()


def engine_of(kind: str, world: World | None = None, reduction: str = "auto", **changes: Any) -> Engine:
    """kind: flat, ddp, or ddp on fused kernels as on a GPU; `late` after it: as where reading waits for the device."""
    torch.manual_seed(0)
    cfg = SimpleNamespace(**{**OPTIM, "ENGINE": kind.split()[0], **changes})
    device = torch.device("cuda" if "cuda" in kind else "cpu")
    engine = Engine(Net().to(device), cfg, world or World(virtual_workers=2, device=device), reduction)
    if device.type == "cuda":
        return engine
    if "fused" in kind:
        groups = stepped_groups(engine.model, cfg)
        engine.stepper = TorchStepper(groups, optimizer_options(cfg), engine.precision.scaler, None, fused=True)
    engine.reads_late = "late" in kind
    return engine


def inputs(step: int, v: int) -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step + v))


def take(engine: Engine, step: int, spoil: float = 1.0, branch: bool = True) -> Stepped:
    """One step; virtual worker 1's first input is multiplied by `spoil`."""
    engine.zero_grad()
    for v in engine.world.block:
        x = inputs(step, v)
        x[0, 0] *= spoil if v == 1 else 1.0
        x = x.to(engine.world.device)
        with engine.virtual_worker():
            engine.backward(engine.model(x, branch), 1 / engine.world.virtual_workers)
    return engine.step(settings(0.05, 0.9, clip=0.5), ())


def everything(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.live_tensors().items()}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Moments that one of them does not have yet are zero, which is what they begin with."""
    for name in {**found, **expected}:
        both = [side.get(name, torch.zeros(())).cpu() for side in (found, expected)]
        assert torch.equal(*both) or (name.startswith("moments.") and not any(tensor.any() for tensor in both)), name


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ON_A_GPU = [pytest.param(f"{kind} cuda", marks=needs_gpu) for kind in ("flat", "ddp")]
ENGINES = pytest.mark.parametrize("kind", ["flat", "flat late", "ddp", "ddp fused late", *ON_A_GPU])


@ENGINES
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("spoil", [NAN, math.inf])
def test_a_step_that_is_not_finite_leaves_no_trace(kind: str, optimizer: str, spoil: float) -> None:
    spoilt, spared = (engine_of(kind, OPTIMIZER=optimizer) for _ in range(2))
    for step in range(4):
        for engine in (spoilt, spared):
            take(engine, step, branch=step > 0)
        before = everything(spoilt)
        assert not take(spoilt, 50 + step, spoil).loss.isfinite()
        assert_same_bits(everything(spoilt), before)
    assert_same_bits(everything(spoilt), everything(spared))


@ENGINES
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_bad_first_step_is_no_first_step(kind: str, optimizer: str) -> None:
    spoilt, spared = (engine_of(kind, OPTIMIZER=optimizer) for _ in range(2))
    take(spoilt, 50, NAN)
    for engine in (spoilt, spared):
        take(engine, 0)
    assert_same_bits(everything(spoilt), everything(spared))


def test_the_host_hears_of_it_at_once_or_where_that_would_wait_two_steps_later() -> None:
    kinds = {"flat": 0, "flat late": 2} | ({"flat cuda": 2, "ddp cuda": 2} if torch.cuda.is_available() else {})
    for kind, ago in kinds.items():
        engine = engine_of(kind)
        told = [take(engine, step, NAN if step in (2, 3) else 1.0).bad_step for step in range(7)]
        found = {step: bad_step for step, bad_step in enumerate(told) if bad_step is not None}
        assert {step: (each.ago, each.in_a_row) for step, each in found.items()} == {
            2 + ago: (ago, 1),
            3 + ago: (ago, 2),
        }
        assert all(each.kind == "nonfinite" and math.isnan(each.loss) and each.here for each in found.values())
        assert engine.guard.in_a_row == 0


def test_where_it_comes_late_the_parameters_are_those_near_the_bad_numbers() -> None:
    model = nn.ModuleDict({name: nn.Linear(100, 100) for name in "abc"})
    engine = Engine(model, SimpleNamespace(**OPTIM), World())
    engine.reads_late, told = True, []
    for step in range(4):
        engine.zero_grad()
        engine.backward(sum(layer(torch.ones(100)).sum() for layer in model.values()), 1.0)  # type: ignore[arg-type]
        if step == 1:
            model["b"].weight.grad[30, 5] = NAN  # of 10 000 numbers, in the row of 4096 where its neighbour ends
        told.append(engine.step(settings(clip=0.5), ()).bad_step)
    assert [bad_step.parameters for bad_step in told if bad_step] == [["b.weight"]]
    assert told[3] is not None and not told[3].here and culprits([told[3], told[3]]) == [0, 1]


def spoilt_gradient(
    rank: int, kind: str, reduction: str
) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Rank 1's loss is finite, the gradient of one of its parameters is not."""
    engine = engine_of(kind, World(rank, 2, 2), reduction)
    take(engine, 0)
    before = everything(engine)
    if rank == 1:
        engine.model.branch.bias.register_hook(lambda grad: grad * NAN)
    return take(engine, 1).bad_step, before, everything(engine)


@pytest.mark.parametrize("kind", ["flat", "ddp"])
@pytest.mark.parametrize("reduction", ["shared_memory", "collective"])
def test_all_ranks_come_to_one_verdict_and_the_one_at_fault_names_its_parameters(
    pair: Pair, kind: str, reduction: str
) -> None:
    found = pair.run(spoilt_gradient, kind, reduction)
    for rank, (bad_step, before, after) in enumerate(found):
        assert (bad_step.kind, bad_step.in_a_row, bad_step.here) == ("nonfinite", 1, rank == 1)
        assert bad_step.parameters == (["branch.bias"] if rank == 1 else []) and math.isfinite(bad_step.loss)
        assert_same_bits(after, before)
    assert culprits([bad_step for bad_step, _, _ in found]) == [1]


def test_fp16_overflows_are_the_scalers_and_a_loss_that_is_not_finite_makes_a_bad_step() -> None:
    engine = engine_of("ddp", USE_AMP=True)
    before = everything(engine)
    overflow = engine.model.branch.bias.register_hook(lambda grad: grad * math.inf)
    stepped = take(engine, 0)
    assert not stepped.grad_norm.isfinite() and stepped.bad_step is None
    assert engine.precision.scaler.get_scale() == 32768.0
    overflow.remove()
    bad_step = take(engine, 1, NAN).bad_step
    assert bad_step is not None and bad_step.kind == "nonfinite"
    weights = [name for name in before if name.startswith("params.")]
    assert_same_bits({n: everything(engine)[n] for n in weights}, {n: before[n] for n in weights})


# Spikes


def guard_of(scaled: bool = False) -> Guard:
    spike = SimpleNamespace(FACTOR=3.0, WINDOW=5, ACTION="skip")
    return Guard(SimpleNamespace(**{**OPTIM, "SPIKE": spike}), torch.device("cpu"), scaled)


def verdicts(guard: Guard, losses: list[float], norms: list[float] | None = None) -> str:
    """A letter a step: s for a spike, n for what is not finite."""
    norms = norms or [1.0] * len(losses)
    read = [guard.read(torch.tensor(a), torch.tensor(b)) for a, b in zip(losses, norms, strict=True)]
    return "".join(" sn"[each] for each in read)


@pytest.mark.parametrize("usual", [2.0, -2.0])
def test_a_spike_is_far_above_the_median_of_a_full_window_of_good_steps(usual: float) -> None:
    high = usual + 2.1 * abs(usual)
    assert verdicts(guard_of(), [high, usual, high, usual, usual, usual, high, -high, high]) == "      s s"
    assert verdicts(guard_of(), [usual] * 7, [1.0] * 5 + [3.1, 2.9]) == "     s "
    assert verdicts(guard_of(), [usual] * 5 + [NAN, usual], [1.0] * 6 + [math.inf]) == "     nn"


def test_spikes_do_not_become_the_usual_and_a_median_of_zero_has_none() -> None:
    guard = guard_of()
    assert verdicts(guard, [1.0] * 5 + [9.0] * 20) == " " * 5 + "s" * 20
    assert guard.in_a_row == 20
    assert verdicts(guard_of(), [0.0] * 5 + [9.0] * 2) == " " * 7
    overflows = [1.0, math.inf, 1.0, math.inf, 1.0, 1.0, 1.0, math.inf, 9.0]  # fp16's are neither a spike nor usual
    assert verdicts(guard_of(scaled=True), [1.0] * 9, overflows) == " " * 8 + "s"


@pytest.mark.parametrize("kind", ["flat", "flat late", *ON_A_GPU])
def test_a_spike_leaves_no_trace_either(kind: str) -> None:
    spike = SimpleNamespace(FACTOR=4.0, WINDOW=3, ACTION="skip")
    engine = engine_of(kind, SPIKE=spike)
    for step in range(5):
        assert take(engine, step).bad_step is None
    engine.model.linear.weight.data.mul_(1000.0)
    before = everything(engine)
    told = [take(engine, 5).bad_step, take(engine, 6).bad_step, take(engine, 7).bad_step]
    bad_step = told[2 if engine.reads_late else 0]
    assert bad_step is not None and bad_step.kind == "spike"
    assert_same_bits(everything(engine), before)


# Going back


@pytest.mark.parametrize("kind", ["flat", "ddp", "flat late", *ON_A_GPU])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_after_a_rollback_a_run_is_the_one_that_stood_there(kind: str, optimizer: str) -> None:
    """Also if moments that it has now did not exist there."""
    run, fresh = (engine_of(kind, OPTIMIZER=optimizer, NONFINITE="rollback") for _ in range(2))
    run.drop_anchor(0)
    for step in range(4):
        take(run, step, branch=step > 1)
    assert run.roll_back() == 0
    for step in range(5, 8):
        for engine in (run, fresh):
            take(engine, step, branch=step > 5)
    assert_same_bits(everything(run), everything(fresh))


def test_what_the_guard_knows_is_tensors_that_a_resumed_run_takes_over() -> None:
    spike = SimpleNamespace(FACTOR=4.0, WINDOW=3, ACTION="rollback")
    whole, resumed = (engine_of("flat late", SPIKE=spike, NONFINITE="rollback") for _ in range(2))
    whole.drop_anchor(7)
    for step in range(4):
        take(whole, step)
    take(whole, 4, NAN)
    state, living = whole.guard.state(), everything(whole)
    resumed.load_optimizer_state(whole.optimizer_state())
    for name, tensor in resumed.live_tensors().items():
        tensor.copy_(living[name])
    resumed.load_guard(state)
    for step in (5, 6):
        told = [take(engine, step).bad_step for engine in (whole, resumed)]
        assert [bad_step is None for bad_step in told] == [step == 5] * 2
    assert len({repr(dataclasses.replace(bad_step, parameters=[])) for bad_step in told if bad_step}) == 1
    assert whole.roll_back() == resumed.roll_back() == 7
    assert_same_bits(everything(resumed), everything(whole))
    for name, tensor in whole.guard.state().items():
        assert tensor is state[name] or name == "anchor"  # where it was


def test_a_checkpoint_without_a_guard_or_with_an_anchor_of_another_model_is_taken_over_all_the_same() -> None:
    engine = engine_of("flat", NONFINITE="rollback")
    engine.load_guard({})
    assert engine.guard.anchor_due(5) and engine.guard.in_a_row == 0
    engine.load_guard({"in_a_row": torch.tensor(3.0), "anchor": {"params.0": torch.zeros(2)}})
    assert engine.guard.anchor_due(5) and engine.guard.in_a_row == 3
    engine.drop_anchor(5)
    assert not engine.guard.anchor_due(6) and engine.guard.anchor_due(200)
    assert not engine_of("flat").guard.anchor_due(0)


# Parts


def test_a_bad_step_is_told_in_one_line() -> None:
    bad_step = BadStep("nonfinite", 0, 1, NAN, NAN, 1.0, ["a", "b"])
    told = described(12, bad_step, [1], ["a.weight", "b", "c", "d", "e", "f"], list(range(30)))
    assert told.startswith(
        "step 12: the loss is nan (rank 1; first in the gradient of a.weight, b, c, d, e and 1 more; samples 0, 1"
    )
    assert told.endswith("22, 23 and 6 more)")
    assert "gradient's norm is inf (rank 0)" in described(
        3, BadStep("nonfinite", 2, 1, 1.0, math.inf, 1.0, []), [0], [], []
    )
    high = [BadStep("spike", 0, 1, 9.0, 2.0, here, []) for here in (1.0, 7.0, 2.0)]
    assert culprits(high) == [1] and "the loss is 9 and the gradient's norm 2, far above" in described(
        3, high[0], [1], [], []
    )
    in_sum = [BadStep("nonfinite", 0, 1, math.inf, 1.0, 3e38, [])] * 2
    assert culprits(in_sum) == [0, 1]


# In the loop


def test_where_verdicts_come_late_a_run_skips_the_same_steps(tmp_path: Path) -> None:
    found = []
    for late in (False, True):
        run, events = spoilt_run(tmp_path / str(late), late)
        assert [(e["step"], e["in_a_row"], e["action"], e["ranks"]) for e in events] == [(3, 1, "skip", [0])]
        found.append((everything(run.engine), events[0]["samples"]))
    (at_once, suspects), (later, more_suspects) = found
    assert_same_bits(later, at_once)
    assert len(suspects) == 4 and len(more_suspects) == 8  # of its bad micro-batch, and of the whole step
    assert set(suspects) < set(more_suspects)


def test_parameters_that_are_unfrozen_or_replaced_while_training_are_named_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    engine = Engine(model, SimpleNamespace(**OPTIM), World())
    assert engine.newly_untrained() == []
    model[1].requires_grad_(True)
    model[0].bias = nn.Parameter(torch.zeros(2))
    assert engine.newly_untrained() == ["0.bias", "1.weight", "1.bias"]
    assert engine.newly_untrained() == []


def spoilt_run(folder: Path, late: bool) -> tuple[RunState, list[dict[str, Any]]]:
    """A run of 6 steps of two micro-batches, one of which has no finite loss in step 3; and what was told of it."""
    cfg = config(folder, "SpoiltTask", {"ACCUMULATE": 2, "NUM_EPOCHS": 1})
    task = load_task_class(cfg.TASK)(cfg)
    datasets = build_datasets(task, cfg.SEED)
    run = build_run(cfg, task, datasets["train"], plan_of(cfg, len(datasets["train"]), World()), World())
    run.engine.reads_late = late
    feed = Feed(task, datasets, run.plan, run.world, cfg.LOADER, cfg.SEED, lambda epoch: False)
    kept = Kept()
    with contextlib.closing(Journal([kept], cfg.LOG)) as journal:
        saves = Checkpointer(Store(RunFolder(str(folder)).storage, cfg.CHECKPOINT, "launch"), None)
        feed.start(run.progress)
        assert loop.train_model(run, task, feed, Recorder(run, feed, saves, journal, Control(), Heartbeat()))
    return run, [record for record in kept.records if record["kind"] == "event" and record["event"] != "note"]
