"""pcdet's data sets as the feed wants them: a sample depends on its number, the epoch and what is drawn for it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from raytrain.tasks.openpcdet.checkout import Checkout
from raytrain.tasks.openpcdet.shared_list import SharedList

# What load_data_to_gpu leaves as it is, of the arrays in a batch.
LEFT = frozenset(["frame_id", "metadata", "calib", "image_paths", "ori_shape", "img_process_infos"])


class Frames(Dataset[dict[str, Any]]):
    """A data set of pcdet's, its lists shared between loader workers and its augmentors without memory.

    checkout:     where pcdet is; it comes first, as what is unpickled after it needs that
    last_epochs:  (epoch from which, names of the augmentors that are then left out), of DisableAugmentationHook
    """

    def __init__(self, checkout: Checkout, dataset: Any, last_epochs: tuple[int, tuple[str, ...]] | None) -> None:
        self.checkout = checkout
        self.dataset = dataset
        self.last_epochs = last_epochs
        self._augmentors = self._named_augmentors()
        share_lists(dataset)
        for sampler in self._samplers():
            sampler.db_infos = {name: SharedList(infos) for name, infos in sampler.db_infos.items()}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """gt_sampling walks through a shuffled list from where the last sample has left it; here each begins anew."""
        groups = [group for sampler in self._samplers() for group in sampler.sample_groups.values()]
        kept = [dict(group) for group in groups]
        try:
            return self.dataset[index]
        finally:
            for group, before in zip(groups, kept, strict=True):
                group.update(before)

    def set_epoch(self, epoch: int) -> None:
        """Leave out the augmentors that DisableAugmentationHook names, in the last epochs."""
        if self.last_epochs is None or not self._augmentors:
            return
        begins, names = self.last_epochs
        left_out = names if epoch >= begins else ()
        queue = [augmentor for name, augmentor in self._augmentors if name not in left_out]
        self.dataset.data_augmentor.data_augmentor_queue = queue

    def __getstate__(self) -> dict[str, Any]:
        """Without the voxel generator, which is made with the first sample and cannot be pickled."""
        state = dict(self.__dict__)
        processor = getattr(self.dataset, "data_processor", None)
        if getattr(processor, "voxel_generator", None) is not None:
            state["dataset"] = copy.copy(self.dataset)
            give_logger(state["dataset"])  # a copy is made of what is pickled
            state["dataset"].data_processor = copy.copy(processor)
            state["dataset"].data_processor.voxel_generator = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        give_logger(self.dataset)

    def _samplers(self) -> list[Any]:
        return [augmentor for _, augmentor in self._augmentors if hasattr(augmentor, "sample_groups")]

    def _named_augmentors(self) -> list[tuple[str, Any]]:
        """(NAME, augmentor) in order."""
        augmentor = getattr(self.dataset, "data_augmentor", None)
        if augmentor is None:
            return []
        configs = self.dataset.dataset_cfg.DATA_AUGMENTOR
        disabled = [] if isinstance(configs, list) else configs.get("DISABLE_AUG_LIST", [])
        listed = configs if isinstance(configs, list) else configs.AUG_CONFIG_LIST
        names = [each.NAME for each in listed if each.NAME not in disabled]
        return list(zip(names, augmentor.data_augmentor_queue, strict=True))


def give_logger(dataset: Any) -> None:
    """pcdet's data sets and augmentors drop their logger when they are pickled, and then miss it."""
    logger = logging.getLogger("pcdet")
    augmentor = getattr(dataset, "data_augmentor", None)
    queue = getattr(augmentor, "data_augmentor_queue", ())
    for each in (dataset, augmentor, *(one for one in queue if hasattr(one, "sample_groups"))):
        if each is not None:
            each.logger = logger


def share_lists(dataset: Any) -> None:
    """What a data set has of lists of frames, as SharedList."""
    for name, value in list(vars(dataset).items()):
        if isinstance(value, list) and value and name.endswith("infos") and isinstance(value[0], dict):
            setattr(dataset, name, SharedList(value))


def typed(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with tensors of the types that pcdet's load_data_to_gpu gives: numbers are float32, sizes int32."""
    made = dict(batch)
    for name, value in batch.items():
        if not isinstance(value, np.ndarray) or name in LEFT:
            continue
        if name == "images":  # (B, H, W, C) -> (B, C, H, W), as kornia.image_to_tensor
            value = np.moveaxis(value if value.ndim == 4 else value[..., None], 3, 1)
        kind = np.int32 if name == "image_shape" else np.float32
        made[name] = torch.from_numpy(np.ascontiguousarray(value, dtype=kind))
    return made


def without_shared_memory(tree: Any) -> Iterator[str]:
    """Turns USE_SHARED_MEMORY off everywhere in a data set's config; the names of the sections that had it."""
    if isinstance(tree, dict):
        if tree.get("USE_SHARED_MEMORY"):
            tree["USE_SHARED_MEMORY"] = False
            yield str(tree.get("NAME", tree.get("DATASET", "DATA_CONFIG")))
        for value in tree.values():
            yield from without_shared_memory(value)
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for value in tree:
            yield from without_shared_memory(value)
