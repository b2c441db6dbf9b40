"""PointPillars as a task: scenes in, boxes out, scored as the KITTI benchmark scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from raytrain.errors import ConfigError
from raytrain.storage.paths import expanded
from raytrain.task import ModelReturn, Task
from raytrain.tasks.pointpillars.augment import Augmentor, GtSampling
from raytrain.tasks.pointpillars.data_options import read_data_options, without_effect
from raytrain.tasks.pointpillars.dataset import LastEpochs, LidarDataset, SampleFrame, collate
from raytrain.tasks.pointpillars.frames import Annotations, Source, annotations_of, boxes_of
from raytrain.tasks.pointpillars.kitti import KittiSource
from raytrain.tasks.pointpillars.kitti_eval import evaluate, warnings_of
from raytrain.tasks.pointpillars.model import PointPillar
from raytrain.tasks.pointpillars.pictures import Objects, birds_eye
from raytrain.tasks.pointpillars.simulate import MOST_SCENES, SimulatedSource, simulation_options

if TYPE_CHECKING:
    from raytrain.config.sections import Config


def place(name: str) -> tuple[bool, ...]:
    """For the order of metrics: what the benchmark ranks by comes first."""
    return "loose" in name, "R40" not in name, "_3d" not in name, "moderate" not in name


@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found in a frame.

    boxes:  (K, 7) float32, lidar
    scores: (K,) float32, the highest first
    names:  (K,) class names
    """

    frame: SampleFrame
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    names: NDArray[np.str_]

    @property
    def annotations(self) -> Annotations:
        """As KITTI's results have them: those of which the image shows nothing are left out."""
        found = annotations_of(self.names, self.boxes, self.frame.calibration, self.scores)
        sizes = found.bbox[:, 2:] - found.bbox[:, :2]
        return found.only(np.flatnonzero(sizes.min(axis=1, initial=np.inf) > 0))


class PointPillars(Task):
    """OpenPCDet's PointPillar on simulated scenes or on KITTI (DATA_CONFIG.SOURCE)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        if not cfg.CLASS_NAMES:
            raise ConfigError("CLASS_NAMES is empty; name the classes to be found, such as [Car, Pedestrian, Cyclist]")
        self.options = read_data_options(cfg.DATA_CONFIG)
        self.simulation = simulation_options(self.options.SIMULATION)
        told = without_effect(self.options)
        if told is not None:
            self.note(told)

    def build_dataset(self, split: str) -> LidarDataset:
        source = self._source(split)
        if split == "val":
            return LidarDataset(source, self.options, self.cfg.CLASS_NAMES, training=False)
        augmentor = Augmentor.of(self.options.DATA_AUGMENTOR, self.cfg.CLASS_NAMES, source)
        if any(isinstance(step, GtSampling) and step.DB_INFO_PATH for step in augmentor.steps):
            self.note("DB_INFO_PATH of gt_sampling has no effect: objects are cut from the frames themselves")
        last_epochs = self._last_epochs()
        if last_epochs is not None:
            augmentor.without(last_epochs.without)  # says now what it would say in that epoch
        most = MOST_SCENES if self.options.SOURCE == "simulated" and self.simulation.NEW_EACH_EPOCH else None
        return LidarDataset(source, self.options, self.cfg.CLASS_NAMES, True, augmentor, last_epochs, most)

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return collate(samples)

    def build_model(self, dataset: LidarDataset) -> nn.Module:
        size = dataset.processors.voxels.VOXEL_SIZE
        return PointPillar(self.cfg.MODEL, self.cfg.CLASS_NAMES, self.options.POINT_CLOUD_RANGE, size)

    def model_func(self, model: nn.Module, batch: dict[str, Any]) -> ModelReturn:
        assert isinstance(model, PointPillar)
        return ModelReturn(*model.loss(model(batch), batch["gt_boxes"]))

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> list[Detections]:
        assert isinstance(model, PointPillar)
        found = []
        classes = np.array(self.cfg.CLASS_NAMES)
        for frame, one in zip(batch["frame"], model.predictions(model(batch)), strict=True):
            boxes, scores, labels = (one[key].cpu().numpy() for key in ("boxes", "scores", "labels"))
            # Without its points, which a whole split of them would fill the memory with.
            found.append(Detections(dataclasses.replace(frame, points=None), boxes, scores, classes[labels - 1]))
        return found

    def score(self, predictions: list[Detections], dataset: LidarDataset) -> dict[str, float]:
        """Average precision in percent, by class, measure, difficulty and recall: `Car_3d/moderate_R40`."""
        labels = [found.frame.annotations for found in predictions]
        for warning in warnings_of(labels, self.cfg.CLASS_NAMES):
            self.note(warning)
        metrics = evaluate(labels, [found.annotations for found in predictions], self.cfg.CLASS_NAMES)
        return dict(sorted(metrics.items(), key=lambda item: place(item[0])))

    def pictures(self, predictions: list[Detections], dataset: LidarDataset, count: int) -> Iterator[tuple[str, bytes]]:
        low_x, low_y, _, high_x, high_y, _ = self.options.POINT_CLOUD_RANGE
        for index in range(count):
            frame: SampleFrame = dataset[index]["frame"]
            labels = frame.annotations.only(np.isin(frame.annotations.names, self.cfg.CLASS_NAMES))
            truth = Objects(boxes_of(labels, frame.calibration), labels.names.tolist())
            found = None
            if predictions:
                one = predictions[index]
                found = Objects(one.boxes, one.names.tolist(), one.scores)
            assert frame.points is not None, "only training samples are without"
            area = (low_x, low_y, high_x, high_y)
            yield frame.name, birds_eye(frame.points, truth, found, area, f"{self.options.SOURCE} {frame.name}")

    def _source(self, split: str) -> Source:
        if self.options.SOURCE == "simulated":
            return SimulatedSource(self.simulation, split, self.cfg.SEED)
        assert self.options.DATA_PATH is not None, "read_data_options has looked"
        names = self.options.DATA_SPLIT.train if split == "train" else self.options.DATA_SPLIT.test
        return KittiSource(expanded(self.options.DATA_PATH, "DATA_CONFIG.DATA_PATH").absolute(), names)

    def _last_epochs(self) -> LastEpochs | None:
        hook = self.cfg.HOOK.DisableAugmentationHook if self.cfg.HOOK else None
        if hook is None:
            return None
        return LastEpochs(self.cfg.OPTIMIZATION.NUM_EPOCHS - hook.NUM_LAST_EPOCHS, tuple(hook.DISABLE_AUG_LIST))
