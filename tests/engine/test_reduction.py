"""Gradients are summed through memory that the processes of a host share: the same sums, no traces, no silent waits."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from optimization import optim_cfg, settings
from processes import Pair
from torch import nn

from raytrain.engine import mapped_memory
from raytrain.engine.engine import Engine
from raytrain.engine.gradients import open_reduction
from raytrain.engine.reduction import Reduction
from raytrain.engine.shared_memory import SharedMemoryReduction
from raytrain.engine.tree import additions
from raytrain.engine.world import World
from raytrain.errors import PreflightError, TrainingError
from raytrain.storage.processes import started_at

SMALL = {torch.float32: 48}
SIZES = {torch.float32: 72_000, torch.float64: 48, torch.bfloat16: 96}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with contextlib.closing(Pair(tmp_path_factory.mktemp("three") / "meeting", 3)) as processes:
        yield processes


def opened_for(
    world: World, buffers: dict[str, torch.Tensor], reduction: str, sizes: dict[torch.dtype, int] = SMALL
) -> Reduction:
    """Of processes that host a virtual worker each."""
    adds = additions(world.rank, world.size, world.virtual_workers)
    return open_reduction(sizes, buffers, world, reduction, adds, is_exact=True)


def addend(rank: int, turn: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * turn + rank)
    return torch.randn(SIZES[dtype], generator=generator, dtype=torch.float64).to(dtype)


def buffers_of(rank: int, turn: int) -> dict[str, torch.Tensor]:
    flags = torch.tensor([rank == 0, turn > 0])
    return {"mean": torch.full((2, 3), 10.0 * rank + turn), "count": torch.tensor(rank + turn), "flags": flags}


def shared_turns(
    rank: int, size: int, reduction: str, turns: int
) -> tuple[str, list[dict[torch.dtype, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """What each turn left in the sums and in the tensors that shall be rank 0's."""
    torch.set_num_threads(1)
    world = World(rank, size, size)
    opened = opened_for(world, buffers_of(rank, 0), reduction, SIZES)
    sums, buffers = [], []
    for turn in range(turns):
        opened.open()
        for dtype, buffer in opened.nodes[0].items():
            buffer.copy_(addend(rank, turn, dtype))
        mine = buffers_of(rank, turn)
        opened.reduce(mine)
        sums.append({dtype: total.clone() for dtype, total in opened.sums.items()})
        buffers.append(mine)
    return opened.kind, sums, buffers


@pytest.mark.parametrize("reduction", ["auto", "collective"])
def test_every_process_gets_the_same_sums_in_the_order_of_ranks(three: Pair, reduction: str) -> None:
    answers = three.run(shared_turns, 3, reduction, 4)
    assert {kind for kind, _, _ in answers} == {"shared memory" if reduction == "auto" else "ordered collective"}
    for _, sums, buffers in answers:
        for turn, found in enumerate(sums):
            for dtype, total in found.items():
                expected = addend(0, turn, dtype) + addend(1, turn, dtype) + addend(2, turn, dtype)
                assert torch.equal(total, expected)
                assert torch.equal(total, answers[0][1][turn][dtype])
            assert all(torch.equal(buffers[turn][name], buffer) for name, buffer in buffers_of(0, turn).items())


def test_two_processes_get_the_bits_that_a_collective_gives(pair: Pair) -> None:
    shared, collective = pair.run(shared_turns, 2, "shared_memory", 3), pair.run(shared_turns, 2, "collective", 3)
    for (_, ours, _), (_, theirs, _) in zip(shared, collective, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert all(torch.equal(a[dtype], b[dtype]) for dtype in (torch.float32, torch.float64))


def test_one_process_needs_no_one() -> None:
    alone = opened_for(World(), {}, "shared_memory")
    assert type(alone) is Reduction and alone.sums is alone.nodes[0]


def out_of_step(rank: int) -> list[float]:
    """Ranks that come late in turn, one of them by more than the naps are long."""
    opened = opened_for(World(rank, 3, 3), {}, "auto")
    found = []
    for turn in range(30):
        if turn % 3 == rank:
            time.sleep(0.002 if turn < 29 else 0.7)  # 0.7 s: longer than PEER_CHECK_S
        opened.open()
        opened.nodes[0][torch.float32].fill_(float(turn + rank))
        opened.reduce({})
        found.append(float(opened.sums[torch.float32][3]))
    return found


def test_processes_that_come_late_are_waited_for(three: Pair) -> None:
    assert three.run(out_of_step) == [[3.0 * turn + 3 for turn in range(30)]] * 3


def growing(rank: int, reduction: str) -> list[list[float]]:
    """A cache that rank 0 makes longer in the second turn, beside statistics that every rank has."""
    buffers = {"cache": torch.zeros(2), "mean": torch.zeros(3)}
    opened = opened_for(World(rank, 2, 2), buffers, reduction)
    seen = []
    for length in (2, 5 - 3 * rank, 2):
        mine = {"cache": torch.full((length,), float(rank + 1)), "mean": torch.full((3,), float(rank + 1))}
        opened.open()
        opened.reduce(mine)
        assert list(opened.unstaged(mine)) == (["cache"] if length == 5 else [])
        seen.append([*mine["cache"].tolist(), *mine["mean"].tolist()])
    return seen


@pytest.mark.parametrize("reduction", ["shared_memory", "collective"])
def test_a_buffer_that_grows_on_one_rank_leaves_all_others_as_they_should_be(pair: Pair, reduction: str) -> None:
    assert pair.run(growing, reduction) == [[[1.0] * 5, [1.0] * 8, [1.0] * 5], [[1.0] * 5] * 3]


# What must hold for memory to be shared


def seen_fence(rank: int) -> str:
    world = World(rank, 2, 2)
    mapped_memory.platform = SimpleNamespace(machine=lambda: "aarch64")  # type: ignore[assignment]
    try:
        return opened_for(world, {}, "auto").kind + str(shared_turns(rank, 2, "auto", 2)[1])
    finally:
        mapped_memory.platform = platform


def test_machines_with_a_weak_memory_order_share_memory_behind_fences(pair: Pair) -> None:
    if mapped_memory.libatomic_fence() is None:
        pytest.skip("libatomic.so.1 is not here")
    first, second = pair.run(seen_fence)
    assert first == second and first.startswith("shared memory")


def without_memfd(rank: int, reduction: str) -> str:
    kept = os.memfd_create
    if rank == 1:
        del os.memfd_create
    try:
        return opened_for(World(rank, 2, 2), {}, reduction).kind
    except PreflightError as error:
        return str(error)
    finally:
        os.memfd_create = kept


def test_where_one_process_cannot_share_memory_all_use_collectives(pair: Pair) -> None:
    assert pair.run(without_memfd, "auto") == ["ordered collective"] * 2
    for told in pair.run(without_memfd, "shared_memory"):
        assert told.startswith("SCALE.REDUCTION is shared_memory, but ") and told.endswith("; set it to auto")


def test_more_processes_than_cores_never_spin(three: Pair) -> None:
    cores = mapped_memory.num_cpus()
    assert three.run(spins) == [cores >= 3] * 3


def spins(rank: int) -> bool:
    opened = opened_for(World(rank, 3, 3), {}, "auto")
    assert isinstance(opened, SharedMemoryReduction)
    return opened._spins


# Ends


def traces() -> set[Path]:
    return {*Path("/dev/shm").glob("*raytrain*"), *Path("/tmp").glob("raytrain-reduction*")}


def train_until_killed(rank: int, steps: int, dies: int) -> str:
    """An engine on shared memory; rank `dies` kills itself in the middle of the third step."""
    torch.manual_seed(0)
    model = nn.Linear(50, 50)
    cfg = optim_cfg(OPTIMIZER="adamw", LR=0.1)
    engine = Engine(model, cfg, World(rank, 2, 2), "shared_memory")
    for step in range(steps):
        engine.zero_grad()
        engine.backward(model(torch.ones(1, 50)).sum(), 0.5)
        if step == 2 and rank == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        try:
            engine.step(settings(clip=1.0), ())
        except TrainingError as error:
            assert time.monotonic() - began < 5
            return str(error)
    return "done"


@pytest.mark.parametrize("dies", [0, 1])
def test_a_killed_process_is_named_within_seconds_and_leaves_nothing(dies: int, tmp_path: Path) -> None:
    before = traces()
    with contextlib.closing(Pair(tmp_path / "meeting")) as pair:
        pair.ask(train_until_killed, 5, dies)
        worked, told = pair.answer(1 - dies)
        assert worked, told
    assert told.startswith(f"rank {dies} (process {pair.pids[dies]}) has died; rank {1 - dies} waited for its gradient")
    assert traces() <= before


def test_a_process_is_dead_when_it_is_gone_or_only_not_buried() -> None:
    assert started_at(os.getpid()) == started_at(os.getpid()) is not None
    child = os.fork()
    if child == 0:
        os._exit(0)
    for _ in range(100):
        if started_at(child) is None:
            break
        time.sleep(0.02)
    assert started_at(child) is None  # a zombie
    os.waitpid(child, 0)
    assert started_at(child) is None


def maps_of(rank: int) -> tuple[int, int]:
    """How often this process has memory of ours mapped while a reduction stands, and after it is gone."""

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("raytrain-reduction")

    opened = opened_for(World(rank, 2, 2), {}, "shared_memory")
    opened.open()
    opened.reduce({})
    during = mapped()
    del opened
    return during, mapped()


def test_memory_goes_with_the_reduction(pair: Pair) -> None:
    assert pair.run(maps_of) == [(1, 0)] * 2
