"""OpenPCDet's detectors as a task: its data sets, models and evaluations, by its own code."""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from raytrain.errors import TaskError
from raytrain.journal.run_folder import run_dir_of
from raytrain.task import ModelReturn, Task
from raytrain.tasks.openpcdet import adapted
from raytrain.tasks.openpcdet.checkout import find_checkout
from raytrain.tasks.openpcdet.frames import Frames, give_logger, typed, without_shared_memory

if TYPE_CHECKING:
    from raytrain.config.sections import Config


class OpenPCDetTask(Task):
    """Any model of OpenPCDet's on its data sets, by the pcdet that the YAML lies beside, or an installed one."""

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.checkout = find_checkout(cfg.CFG_FILE)
        self._val: Frames | None = None

    def build_dataset(self, split: str) -> Frames:
        self.checkout.use()
        from pcdet import datasets

        data_config, name = _easy(self.cfg.DATA_CONFIG), self.cfg.DATA_CONFIG.get("DATASET")
        if name not in datasets.__all__:
            raise TaskError(f"DATA_CONFIG.DATASET is {name}; pcdet has {', '.join(datasets.__all__)}")
        for section in without_shared_memory(data_config):
            self.note(
                f"USE_SHARED_MEMORY of {section} has no effect: files are read through the system's cache, which all "
                "processes share, and nothing is left in /dev/shm"
            )
        root = self._data_path(data_config)
        try:
            dataset = datasets.__all__[name](
                dataset_cfg=data_config,
                class_names=list(self.cfg.CLASS_NAMES),
                training=split == "train",
                root_path=root,
                logger=logging.getLogger("pcdet"),
            )
        except FileNotFoundError as error:
            raise TaskError(f"{name} cannot be read: {error}. {self._advice(root)}") from error
        if not len(dataset):
            raise TaskError(f"{name} has no frame for {split!r} in {root}. {self._advice(root)}")
        give_logger(dataset)
        frames = Frames(self.checkout, dataset, self._last_epochs() if split == "train" else None)
        if split == "val":
            self._val = frames
        return frames

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        self.checkout.use()
        from pcdet import datasets

        return typed(datasets.__all__[self.cfg.DATA_CONFIG["DATASET"]].collate_batch(samples))

    def build_model(self, dataset: Frames) -> nn.Module:
        self.checkout.use()
        from pcdet.models import build_network

        from raytrain.engine.determinism import device_here

        adapted.finder().cuda.device = device_here(self.cfg)  # anchors and grids are put there for good
        model = build_network(
            model_cfg=_easy(self.cfg.MODEL), num_class=len(self.cfg.CLASS_NAMES), dataset=dataset.dataset
        )
        assert isinstance(model, nn.Module)
        return model

    def to_device(self, batch: Any, device: torch.device) -> Any:
        adapted.finder().cuda.device = device
        return super().to_device(batch, device)

    def model_func(self, model: nn.Module, batch: dict[str, Any]) -> ModelReturn:
        returned, tb_dict, disp_dict = model(dict(batch))
        _count_step(model)
        return ModelReturn(returned["loss"].mean(), tb_dict, disp_dict)

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """What is found in each frame as pcdet's annotations, with what the batch counts for recall in the first."""
        assert self._val is not None, "the validation split was built"
        batch = dict(batch)
        found, recall = model(batch)
        annotations = self._val.dataset.generate_prediction_dicts(batch, found, list(self.cfg.CLASS_NAMES))
        counts = {name: _number(value) for name, value in recall.items()}
        return [{"annotations": each, "recall": {} if rank else counts} for rank, each in enumerate(annotations)]

    def score(self, predictions: list[dict[str, Any]], dataset: Frames) -> dict[str, float]:
        """Recall over all boxes at RECALL_THRESH_LIST, and what the data set's own evaluation gives."""
        counts: Counter[str] = Counter()
        for each in predictions:
            counts.update(each["recall"])
        found = [each["annotations"] for each in predictions]
        post = _easy(self.cfg.MODEL["POST_PROCESSING"])
        metrics: dict[str, float] = {}
        for threshold in post.get("RECALL_THRESH_LIST", []):
            for stage in ("roi", "rcnn"):
                metrics[f"recall/{stage}_{threshold}"] = counts[f"{stage}_{threshold}"] / max(counts["gt"], 1)
        with self._output_folder() as folder:
            (Path(folder) / "result.pkl").write_bytes(pickle.dumps(found))
            text, evaluated = dataset.dataset.evaluation(
                found, list(self.cfg.CLASS_NAMES), eval_metric=post.EVAL_METRIC, output_path=Path(folder)
            )
        self.note(f"epoch {self.progress.epoch}:\n{text}" if text else "the data set's evaluation says nothing")
        metrics.update({name: _number(value) for name, value in (evaluated or {}).items()})
        return metrics or {"boxes": sum(len(each["name"]) for each in found) / max(len(found), 1)}

    def _output_folder(self) -> AbstractContextManager[str]:
        """Where OpenPCDet has it, in the run folder; one that goes again where that is no folder of this machine."""
        run_dir = run_dir_of(self.cfg)
        if "://" in run_dir:
            return tempfile.TemporaryDirectory(prefix="raytrain-evaluation-")
        folder = Path(run_dir) / "eval" / f"epoch_{self.progress.epoch}" / "val" / "default"
        folder.mkdir(parents=True, exist_ok=True)
        return nullcontext(str(folder))

    def _data_path(self, data_config: Any) -> Path:
        """DATA_PATH from the current folder, as pcdet has it, else from the folder above `cfgs`."""
        given = Path(os.path.expandvars(str(data_config.DATA_PATH))).expanduser()
        places = [Path.cwd(), *(p.parent for p in Path(self.cfg.CFG_FILE or "").parents if p.name == "cfgs")]
        found = [place / given for place in places if (place / given).exists()]
        return found[0] if found else given

    def _advice(self, root: Path) -> str:
        return (
            f"What to do: put the data where DATA_CONFIG.DATA_PATH says ({root.absolute()}), or change that (--set "
            f"DATA_CONFIG.DATA_PATH ...), and make its tables as OpenPCDet's GETTING_STARTED.md says"
        )

    def _last_epochs(self) -> tuple[int, tuple[str, ...]] | None:
        hook = self.cfg.HOOK.DisableAugmentationHook if self.cfg.HOOK else None
        if hook is None:
            return None
        return self.cfg.OPTIMIZATION.NUM_EPOCHS - hook.NUM_LAST_EPOCHS, tuple(hook.DISABLE_AUG_LIST)


def _easy(tree: Mapping[str, Any]) -> Any:
    """A tree as pcdet reads it, by attribute."""
    from easydict import EasyDict

    return EasyDict(tree)


def _count_step(model: nn.Module) -> None:
    count = getattr(model, "update_global_step", None)
    if count is not None:
        count()


def _number(value: Any) -> float:
    return float(value.item() if hasattr(value, "item") else value)
