"""Mixed precision on the CPU: bf16 as it is, fp16 with a loss scale that is part of the run's state."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import optimization
import pytest
import torch
from optimization import settings
from processes import Pair
from torch import nn

from raytrain.engine.determinism import torch_put_back
from raytrain.engine.engine import Engine
from raytrain.engine.precision import Precision, fp32_precisions, set_fp32_precisions, set_tf32
from raytrain.engine.world import World

CPU = torch.device("cpu")


def optim_cfg(**changes: Any) -> SimpleNamespace:
    """Plain SGD in fp16."""
    plain = {"OPTIMIZER": "sgd", "LR": 0.1, "WEIGHT_DECAY": 0.0, "MOMENTUM": 0.0, "USE_AMP": True}
    return optimization.optim_cfg(**{**plain, **changes})


def engine_of(world: World | None = None, **changes: Any) -> tuple[nn.Module, Engine]:
    torch.manual_seed(1)
    model = nn.Linear(4, 1)
    return model, Engine(model, optim_cfg(**changes), world or World())


def one_step(model: nn.Module, engine: Engine, factor: float = 1.0) -> torch.Tensor:
    """A step on loss * factor; the norm of its gradient."""
    engine.zero_grad()
    with engine.virtual_worker(), engine.precision.autocast():
        loss = model(torch.full((2, 4), 0.25)).float().mean() * factor
        engine.backward(loss, 1.0 / engine.world.virtual_workers)
    return engine.step(settings(clip=10.0, weight_decay=0.0), ()).grad_norm


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_forward_pass_runs_in_the_dtype_of_the_config(name: str, dtype: torch.dtype) -> None:
    precision = Precision(optim_cfg(AMP_DTYPE=name), CPU)
    with precision.autocast():
        assert nn.Linear(4, 2)(torch.ones(1, 4)).dtype is dtype
    assert precision.scaler.is_enabled() == (name == "fp16")


def test_without_amp_nothing_changes() -> None:
    precision = Precision(optim_cfg(USE_AMP=False), CPU)
    with precision.autocast():
        assert nn.Linear(4, 2)(torch.ones(1, 4)).dtype is torch.float32
    assert not precision.scaler.is_enabled() and precision.state_dict() == {}


@pytest.mark.parametrize("changes", [{"USE_AMP": False}, {"AMP_DTYPE": "bf16"}, {"LOSS_SCALE_FP16": 128.0}])
def test_the_step_and_the_norm_are_those_of_full_precision_to_its_rounding(changes: dict[str, Any]) -> None:
    plain_model, plain = engine_of(USE_AMP=False)
    model, engine = engine_of(**changes)
    for _ in range(3):
        expected, found = one_step(plain_model, plain), one_step(model, engine)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)  # unscaled: not 65536 times it
    torch.testing.assert_close(model.weight, plain_model.weight, rtol=1e-2, atol=1e-3)


def test_the_scale_starts_where_the_config_says() -> None:
    assert engine_of()[1].precision.scaler.get_scale() == 65536
    assert engine_of(LOSS_SCALE_FP16=32.0)[1].precision.scaler.get_scale() == 32


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    model, engine = engine_of(LOSS_SCALE_FP16=1024.0)
    one_step(model, engine)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    norm = one_step(model, engine, factor=1e35)  # 1024 * 1e35 is beyond f32
    assert not torch.isfinite(norm)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert engine.precision.scaler.get_scale() == 512
    one_step(model, engine)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert engine.precision.scaler.get_scale() == 512


def overflow_on_rank_1(rank: int) -> tuple[torch.Tensor, float]:
    model, engine = engine_of(World(rank, 2, 2), LOSS_SCALE_FP16=1024.0)
    one_step(model, engine, factor=1e35 if rank == 1 else 1.0)
    one_step(model, engine)
    return model.weight.detach(), engine.precision.scaler.get_scale()


def test_an_overflow_on_one_rank_skips_the_step_on_all(pair: Pair) -> None:
    (weight, scale), (other, other_scale) = pair.run(overflow_on_rank_1)
    assert scale == other_scale == 512
    assert torch.equal(weight, other)
    model, engine = engine_of(LOSS_SCALE_FP16=1024.0)
    one_step(model, engine)
    torch.testing.assert_close(weight, model.weight.detach(), rtol=1e-3, atol=0)  # one step, not two


def test_a_restored_scaler_goes_on_where_it_was_and_not_at_65536() -> None:
    model, engine = engine_of(LOSS_SCALE_FP16=1024.0)
    for factor in (1.0, 1e35, 1.0, 1.0):
        one_step(model, engine, factor)
    state = engine.precision.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (512.0, 2)
    fresh = Precision(optim_cfg(), CPU)
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    model, restored = engine_of()
    restored.precision.load_state_dict(state)
    one_step(model, restored)
    assert restored.precision.state_dict() == {**state, "_growth_tracker": 3}


def test_a_run_that_takes_up_fp16_starts_with_a_scale_of_its_own() -> None:
    _, engine = engine_of()
    engine.precision.load_state_dict(Precision(optim_cfg(AMP_DTYPE="bf16"), CPU).state_dict())
    assert engine.precision.scaler.get_scale() == 65536


def readable_flags() -> tuple[bool, bool, str]:
    """By torch's older names, as users' code and torch.backends.cudnn.flags() read them."""
    with torch.backends.cudnn.flags():
        pass
    backends = torch.backends
    return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


def test_tf32_is_one_choice_for_products_convolutions_and_recurrent_layers() -> None:
    kept, flags = fp32_precisions(), readable_flags()
    try:
        set_tf32(True)
        assert fp32_precisions() == ["tf32"] * 3 and readable_flags() == (True, True, "high")
        set_tf32(False)
        assert fp32_precisions() == ["ieee"] * 3 and readable_flags() == (False, False, "highest")
    finally:
        set_fp32_precisions(kept)
    assert (fp32_precisions(), readable_flags()) == (kept, flags)


def test_what_a_run_in_this_process_sets_is_put_back() -> None:
    def all_set() -> list[Any]:
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        deterministic = torch.are_deterministic_algorithms_enabled(), warn_only
        return [torch.get_num_threads(), torch.backends.cudnn.benchmark, deterministic, fp32_precisions()]

    before = all_set()
    with pytest.raises(RuntimeError, match="a run"), torch_put_back():
        torch.set_num_threads(before[0] + 1)
        torch.backends.cudnn.benchmark = not before[1]
        torch.use_deterministic_algorithms(True, warn_only=True)
        set_tf32(True)
        raise RuntimeError("a run that fails")
    assert all_set() == before
