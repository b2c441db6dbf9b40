"""BatchNorm over the samples of all worker processes, on the CPU, where torch has none."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.nn.functional import all_reduce


class HostSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose batch is that of all processes together, for every input rank >= 2."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {input.dim()}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (N, C, ...)   Returns the same shape.   Collective in training."""
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        channels = input.shape[1]
        # Sums of bf16 or fp16 in their own type lose most of their digits; torch's BatchNorm uses f32 too.
        exact = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        flat = exact.transpose(0, 1).reshape(channels, -1)  # (C, n)
        n = torch.full((1,), float(flat.shape[1]), dtype=flat.dtype)
        total = all_reduce(torch.cat([flat.sum(1), n]))
        count, mean = total[-1], total[:-1] / total[-1]
        centred = flat - mean[:, None]
        var = all_reduce(centred.square().sum(1)) / count  # two passes: no cancellation
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked += 1
                share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                unbiased = var * (count / (count - 1).clamp(min=1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        shape = (1, channels) + (1,) * (input.dim() - 2)
        normal = (exact - mean.view(shape)) * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)


def convert_to_host_sync_batchnorm(module: nn.Module) -> nn.Module:
    """`module` with each BatchNorm replaced by one over all processes; parameters and buffers are kept."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, HostSyncBatchNorm):
        twin = HostSyncBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
        twin.weight, twin.bias = module.weight, module.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(twin, name, getattr(module, name))
        twin.training = module.training
        return twin
    for name, child in module.named_children():
        setattr(module, name, convert_to_host_sync_batchnorm(child))
    return module
