"""What of torch's settings changes the rounding of sums, fixed for a run and put back after it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from raytrain.config.sections import Config
from raytrain.engine.precision import fp32_precisions, set_fp32_precisions, set_tf32
from raytrain.errors import PreflightError


def device_here(cfg: Config) -> torch.device:
    """The device for training in this process."""
    wanted = cfg.SCALE.USE_GPU
    use_gpu = torch.cuda.is_available() if wanted == "auto" else bool(wanted)
    if use_gpu and not torch.cuda.is_available():
        raise PreflightError("SCALE.USE_GPU is true, but torch finds no GPU here; use --no_gpu")
    return torch.device("cuda" if use_gpu else "cpu")


def prepare_torch(cfg: Config, device: torch.device) -> None:
    """Fix what changes the rounding of floating-point sums: thread count, TF32, and cuDNN's choice of kernels."""
    torch.set_num_threads(cfg.SCALE.THREADS)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.init()  # from here on seed_all reaches the GPU, also while a model is built on it
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        set_tf32(cfg.OPTIMIZATION.TF32)


def torch_differences(threads: int, device: torch.device) -> list[str]:
    """What of prepare_torch's settings the task has changed since, in words."""
    differing = []
    if torch.get_num_threads() != threads:
        now = torch.get_num_threads()
        differing.append(f"the task has set torch to {now} threads, which is for SCALE.THREADS to say (now {threads})")
    if device.type == "cuda" and torch.backends.cudnn.benchmark:
        differing.append("the task has set torch.backends.cudnn.benchmark, by which each run tries other kernels")
    if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        differing.append("the task has turned torch.use_deterministic_algorithms off")
    return differing


@contextlib.contextmanager
def torch_put_back() -> Iterator[None]:
    """What prepare_torch sets in this process is afterwards what it was."""
    threads, benchmark, precisions = torch.get_num_threads(), torch.backends.cudnn.benchmark, fp32_precisions()
    determinism, dtype = deterministic_algorithms(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.backends.cudnn.benchmark = benchmark
        if deterministic_algorithms() != determinism:  # setting it imports torch._inductor: 1.5 s
            torch.use_deterministic_algorithms(determinism[0], warn_only=determinism[1])
        set_fp32_precisions(precisions)


def deterministic_algorithms() -> tuple[bool, bool]:
    """Whether torch uses them, and whether it only warns where there are none."""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
