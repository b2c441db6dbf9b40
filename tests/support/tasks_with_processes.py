"""A task whose samples, batches, data sets and scores are made with processes and threads of their own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import joblib
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import raytrain
from raytrain import ModelReturn

MANY = 1 << 20  # so many that torch's sum of them takes several threads, where it has several


def square(value: float) -> float:
    return value**2


def square_in_torch(value: float) -> float:
    return float(torch.full((MANY,), value).square().mean())


def by_pool(method: str) -> Callable[[list[float]], list[float]]:
    def squares(values: list[float]) -> list[float]:
        with multiprocessing.get_context(method).Pool(2) as pool:
            return pool.map(square, values)

    return squares


def by_torch_in_a_pool(values: list[float]) -> list[float]:
    square_in_torch(1.0)  # after which OpenMP has threads
    with torch.multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.map(square_in_torch, values)


def by_executor(values: list[float]) -> list[float]:
    with concurrent.futures.ProcessPoolExecutor(2) as executor:
        return list(executor.map(square, values))


def by_process(values: list[float]) -> list[float]:
    context = multiprocessing.get_context("fork")
    queue: Any = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put([square(value) for value in values]))
    process.start()
    try:
        return queue.get()
    finally:
        process.join()


def by_manager(values: list[float]) -> list[float]:
    with multiprocessing.Manager() as manager:
        return list(manager.list([square(value) for value in values]))


def by_threads(values: list[float]) -> list[float]:
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        return list(executor.map(square, values))


def by_joblib(backend: str) -> Callable[[list[float]], list[float]]:
    def squares(values: list[float]) -> list[float]:
        return list(joblib.Parallel(n_jobs=2, backend=backend)(joblib.delayed(square)(value) for value in values))

    return squares


def by_program(values: list[float]) -> list[float]:
    command = ["awk", r'{printf "%.17g\n", $1 * $1}']
    done = subprocess.run(command, input="\n".join(map(str, values)), capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def by_terminated_program(values: list[float]) -> list[float]:
    """A program that ends only by SIGTERM, as servers do."""
    program = subprocess.Popen(["sleep", "1000"])
    program.terminate()
    assert program.wait(20) == -15
    return [square(value) for value in values]


def by_shell(values: list[float]) -> list[float]:
    assert os.system("true") == 0
    return [square(value) for value in values]


def by_loader(values: list[float]) -> list[float]:
    return [square(float(value)) for value in DataLoader(values, batch_size=None, num_workers=1)]  # type: ignore[arg-type]


def by_dying(folder: str, values: list[float]) -> list[float]:
    """By a pool whose process dies of what it is to do, once there is a file `go`."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.map(die_in, [folder])


def die_in(folder: str) -> None:
    wait_in(folder)
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # without stacks of all threads
    os.kill(os.getpid(), signal.SIGSEGV)


KEPT: dict[str, Any] = {}  # what nobody shuts down, by process: a fork has none of it


@contextlib.contextmanager
def kept_ones_ended() -> Iterator[None]:
    """Those of this process, with the block."""
    try:
        yield
    finally:
        for kept in KEPT.values():
            kept.__exit__(None, None, None)
        KEPT.clear()


def by_kept_executor(values: list[float]) -> list[float]:
    key = f"executor {os.getpid()}"
    KEPT[key] = KEPT.get(key) or concurrent.futures.ProcessPoolExecutor(1)
    return list(KEPT[key].map(square, values))


def by_kept_pool(values: list[float]) -> list[float]:
    key = f"pool {os.getpid()}"
    KEPT[key] = KEPT.get(key) or multiprocessing.Pool(1)
    return list(KEPT[key].map(square, values))


WAYS: dict[str, Callable[[list[float]], list[float]]] = {
    "fork": by_pool("fork"),
    "forkserver": by_pool("forkserver"),
    "spawn": by_pool("spawn"),
    "torch": by_torch_in_a_pool,
    "executor": by_executor,
    "process": by_process,
    "manager": by_manager,
    "threads": by_threads,
    "loky": by_joblib("loky"),
    "joblib": by_joblib("multiprocessing"),
    "program": by_program,
    "terminated": by_terminated_program,
    "shell": by_shell,
    "loader": by_loader,
    "kept executor": by_kept_executor,
    "kept pool": by_kept_pool,
}


def squares(ways: list[str], values: list[float]) -> list[float]:
    """The values squared, in each of these ways, or by a pool that dies in that folder; all must agree."""
    expected = [square(value) for value in values]
    for way in ways:
        found = WAYS[way](values) if way in WAYS else by_dying(way, values)
        assert found == expected, f"{way}: {found}, not {expected}"
    return expected


class Squares(Dataset[Any]):
    def __init__(self, ways: list[str]) -> None:
        self.ways = ways

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Any:
        return torch.tensor(squares(self.ways, [i / 4])), torch.ones(1)


class Processes(raytrain.Task):
    """DATA_CONFIG: which WAYS are gone IN_BUILD, IN_SAMPLES, IN_COLLATE and IN_SCORE; SLOW: a folder in which a process
    of a pool writes its pid and waits, in score."""

    def ways(self, place: str) -> list[str]:
        return list(self.cfg.DATA_CONFIG.get(place, []))

    def build_dataset(self, split: str) -> Any:
        squares(self.ways("IN_BUILD"), [0.5])
        return Squares(self.ways("IN_SAMPLES"))

    def build_model(self, dataset: Any) -> nn.Module:
        return nn.Linear(1, 1)

    def collate(self, samples: list[Any]) -> Any:
        squares(self.ways("IN_COLLATE"), [0.25])
        return super().collate(samples)

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        return ModelReturn((model(batch[0]) - batch[1]).square().mean())

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return batch[0].squeeze(1)

    def score(self, predictions: list[Any], dataset: Any) -> dict[str, float]:
        folder = self.cfg.DATA_CONFIG.get("SLOW")
        if folder:
            with multiprocessing.get_context("fork").Pool(1) as pool:
                pool.map(wait_in, [folder])
        return {"area": sum(squares(self.ways("IN_SCORE"), [float(p) for p in predictions]))}


def wait_in(folder: str) -> None:
    """Until there is a file `go`."""
    Path(folder, f"at-work-{os.getpid()}").touch()
    while not Path(folder, "go").exists():
        time.sleep(0.02)
