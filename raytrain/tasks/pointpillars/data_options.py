"""DATA_CONFIG: OpenPCDet's keys as its kitti_dataset.yaml has them, and SOURCE and SIMULATION."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, create_model, field_validator

from raytrain.config.schema import Tree, complaints, plain
from raytrain.config.sections import Count, Flag, Natural, Positive, Section
from raytrain.config.yaml_text import node_of
from raytrain.errors import ConfigError

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Features = list[Literal["x", "y", "z", "intensity"]]
FEATURES = ["x", "y", "z", "intensity"]


class Splits(Section):
    """Names of lists in ImageSets: for training, and for evaluation."""

    train: Annotated[str, Field(min_length=1)] = "train"
    test: Annotated[str, Field(min_length=1)] = "val"


class FeatureEncoding(Section):
    encoding_type: Literal["absolute_coordinates_encoding"] = "absolute_coordinates_encoding"
    used_feature_list: Features = FEATURES  # type: ignore[assignment]
    src_feature_list: Features = FEATURES  # type: ignore[assignment]

    @field_validator("used_feature_list", "src_feature_list")
    @classmethod
    def _all(cls, value: list[str]) -> list[str]:
        if value != FEATURES:
            raise ValueError("PointPillars here takes x, y, z, intensity, in this order")
        return value


class Mask(Section):
    NAME: Literal["mask_points_and_boxes_outside_range"] = "mask_points_and_boxes_outside_range"
    REMOVE_OUTSIDE_BOXES: Flag = True
    USE_CENTER_TO_FILTER: Flag = True  # a box counts by its centre; false: by min_num_corners from above
    min_num_corners: Natural = 1


class ShuffleEnabled(Section):
    train: Flag = True
    test: Flag = False


class Shuffle(Section):
    NAME: Literal["shuffle_points"] = "shuffle_points"
    SHUFFLE_ENABLED: ShuffleEnabled = ShuffleEnabled()


class MaxVoxels(Section):
    train: Count
    test: Count


class ToVoxels(Section):
    NAME: Literal["transform_points_to_voxels"] = "transform_points_to_voxels"
    VOXEL_SIZE: Annotated[list[Positive], Field(min_length=3, max_length=3)]  # x y z, metres
    MAX_POINTS_PER_VOXEL: Count
    MAX_NUMBER_OF_VOXELS: MaxVoxels


PROCESSORS: dict[str, type[Section]] = {
    "mask_points_and_boxes_outside_range": Mask,
    "shuffle_points": Shuffle,
    "transform_points_to_voxels": ToVoxels,
}
PLACES = dict(zip(PROCESSORS, ("mask", "shuffle", "voxels"), strict=True))
THEIRS = ("DATASET", "INFO_PATH", "GET_ITEM_LIST")


@dataclasses.dataclass(frozen=True)
class Processors:
    """The steps of DATA_PROCESSOR, which follow each other in this order."""

    voxels: ToVoxels
    mask: Mask | None = None
    shuffle: Shuffle | None = None


class DataOptions(Section):
    SOURCE: Literal["simulated", "kitti"] = "kitti"
    DATA_PATH: str | None = None  # kitti: the folder with ImageSets and training in it
    DATA_SPLIT: Splits = Splits()
    POINT_CLOUD_RANGE: Annotated[list[Number], Field(min_length=6, max_length=6)]  # lowest x y z, highest x y z, metres
    FOV_POINTS_ONLY: Flag = True  # points that the camera sees
    DATA_AUGMENTOR: list[dict[str, Any]] | dict[str, Any] = Tree()  # read by augment
    POINT_FEATURE_ENCODING: FeatureEncoding = FeatureEncoding()
    DATA_PROCESSOR: list[dict[str, Any]]
    SIMULATION: dict[str, Any] = Tree()  # read by simulate
    DATASET: Any = None  # THEIRS: accepted, without effect
    INFO_PATH: Any = None
    GET_ITEM_LIST: Any = None

    @field_validator("POINT_CLOUD_RANGE")
    @classmethod
    def _upwards(cls, value: list[float]) -> list[float]:
        if any(low >= high for low, high in zip(value[:3], value[3:], strict=True)):
            raise ValueError("it must be the lowest x, y, z and then the highest, in metres")
        return value

    @property
    def processors(self) -> Processors:
        """DATA_PROCESSOR, checked."""
        given: dict[str, Any] = {}
        for place, entry in enumerate(self.DATA_PROCESSOR):
            section, name = f"DATA_CONFIG.DATA_PROCESSOR[{place}]", entry.get("NAME")
            if name not in PROCESSORS or name in given:
                told = "comes twice" if name in given else "is unknown"
                raise ConfigError(f"{section}.NAME {name!r} {told}; there are, once each: {', '.join(PROCESSORS)}")
            given[name] = read_section(PROCESSORS[name], section, entry)
        if list(given) != [name for name in PROCESSORS if name in given] or "transform_points_to_voxels" not in given:
            raise ConfigError(
                f"DATA_CONFIG.DATA_PROCESSOR has {', '.join(given) or 'nothing'}; it must have, in this order, "
                f"{', '.join(PROCESSORS)}, of which the first two may be left out"
            )
        found = Processors(**{PLACES[name]: section for name, section in given.items()})
        self._check_grid(found.voxels)
        return found

    def _check_grid(self, voxels: ToVoxels) -> None:
        for axis, size in enumerate(voxels.VOXEL_SIZE):
            low, high = self.POINT_CLOUD_RANGE[axis], self.POINT_CLOUD_RANGE[axis + 3]
            count = (high - low) / size
            if abs(count - round(count)) > 1e-3 or round(count) < 1:
                raise ConfigError(
                    f"DATA_CONFIG.POINT_CLOUD_RANGE is {high - low:g} m along {'xyz'[axis]}, {count:g} voxels of "
                    f"VOXEL_SIZE {size:g} m; it must be a whole number of them"
                )


def read_data_options(found: Mapping[str, Any]) -> DataOptions:
    """The options of a config's DATA_CONFIG; a ConfigError names each key that is wrong."""
    options = read_section(DataOptions, "DATA_CONFIG", found)
    _ = options.processors
    if options.SOURCE == "kitti" and not options.DATA_PATH:
        raise ConfigError(
            "DATA_CONFIG.DATA_PATH is missing; SOURCE kitti needs it: the folder with ImageSets and training in it"
        )
    return options


def without_effect(options: DataOptions) -> str | None:
    """What of a config is OpenPCDet's alone, for the user to be told; None where there is nothing of it."""
    keys = [f"DATA_CONFIG.{key}" for key in THEIRS if key in options.model_fields_set]
    if not keys:
        return None
    return f"{', '.join(keys)} {'have' if len(keys) > 1 else 'has'} no effect: frames are read from KITTI's own files"


Model = TypeVar("Model", bound=BaseModel)


def read_section(model: type[Model], section: str, found: Mapping[str, Any]) -> Model:
    """`found` as `model` has it; a ConfigError names each key that is wrong, with `section` before it."""
    tree = {section: plain(found)}
    fields: dict[str, Any] = {section: (model, ...)}
    whole = create_model("whole", **fields)
    try:
        read: Model = getattr(whole.model_validate(tree), section)
    except ValidationError as error:
        raise ConfigError("\n".join(line for _, line in complaints(error, node_of(tree, "config"), whole))) from error
    return read
