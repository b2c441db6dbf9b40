"""How a batch comes to the device: beside the computation where it can, in the memory format of the model."""

from __future__ import annotations

from typing import Any

import torch

from raytrain.batch import channels_last, is_seen_through, map_tensors, tensors_of
from raytrain.task import Task


class DeviceTransfer:
    """Brings batches to `device` by the task's to_device.

    On a GPU the copy runs on a stream of its own, so that it does not stand in line behind the step
    under way; whatever is computed with the batch waits for it on the device, never on the host. A
    to_device that the task wrote itself runs in the line of the computation: it may compute, and
    code of others launches its kernels where no other stream would wait for them.
    """

    def __init__(self, task: Task, device: torch.device, channels_last: bool = False) -> None:
        self._task, self._device, self._channels_last = task, device, channels_last
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda" and type(task).to_device is Task.to_device:
            self._stream = torch.cuda.Stream(device)

    def to_device(self, batch: Any) -> Any:
        """The batch, ready to be used on the current stream."""
        if self._stream is None or not is_seen_through(batch):
            return self._moved(batch)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            batch = self._moved(batch)
        current.wait_stream(self._stream)
        for tensor in tensors_of(batch):
            if tensor.is_cuda:
                tensor.record_stream(current)  # else its memory may be copied into while the model still reads it
        return batch

    def _moved(self, batch: Any) -> Any:
        batch = self._task.to_device(batch, self._device)
        return map_tensors(channels_last, batch) if self._channels_last else batch
