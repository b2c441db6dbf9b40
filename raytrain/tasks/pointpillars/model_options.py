"""The MODEL section: OpenPCDet's keys of a PointPillar, checked.

What this model does not do is refused with the reason, never passed over: a config that runs means what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from raytrain.config.sections import Count, Flag, Natural, NonNegative, Positive, Section
from raytrain.errors import ConfigError
from raytrain.tasks.pointpillars.data_options import Number, read_section

Share = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1)]


def _only(wanted: Any, why: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if value != wanted:
            raise ValueError(f"{why}; set it to {str(wanted).lower()}")
        return value

    return AfterValidator(check)


class Vfe(Section):
    """From points to one feature vector for each pillar."""

    NAME: Literal["PillarVFE"]
    WITH_DISTANCE: Flag = False  # the distance from the origin, too
    USE_ABSLOTE_XYZ: Flag = True  # OpenPCDet's spelling
    USE_NORM: Flag = True
    NUM_FILTERS: Annotated[list[Count], Field(min_length=1)]

    @model_validator(mode="after")
    def _halves(self) -> Vfe:
        if any(width % 2 for width in self.NUM_FILTERS[:-1]):
            raise ValueError("half of each layer but the last is the pillar's maximum: NUM_FILTERS must be even there")
        return self


class MapToBev(Section):
    NAME: Literal["PointPillarScatter"]
    NUM_BEV_FEATURES: Count  # what VFE gives


class Backbone2d(Section):
    """Blocks of convolutions, each coarser than the one before, brought back to one resolution and joined."""

    NAME: Literal["BaseBEVBackbone"]
    LAYER_NUMS: Annotated[list[Natural], Field(min_length=1)]  # convolutions after the strided one
    LAYER_STRIDES: list[Count]
    NUM_FILTERS: list[Count]
    UPSAMPLE_STRIDES: list[Positive]  # below 1, such as 0.5: a strided convolution
    NUM_UPSAMPLE_FILTERS: list[Count]

    @model_validator(mode="after")
    def _one_of_each(self) -> Backbone2d:
        lengths = {key: len(getattr(self, key)) for key in type(self).model_fields if key != "NAME"}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"its lists must be equally long, one value for each block; they have {lengths}")
        for stride in self.UPSAMPLE_STRIDES:
            factor = stride if stride >= 1 else 1 / stride
            if abs(factor - round(factor)) > 1e-6:
                raise ValueError(f"an UPSAMPLE_STRIDE is {stride}; it must be a whole number or one part of it, as 0.5")
        return self

    def map_size(self, cells: int) -> list[int]:
        """How many cells each block's upsampled map has along an axis of `cells` pillars; they should be equal."""
        sizes = []
        for stride, up in zip(self.LAYER_STRIDES, self.UPSAMPLE_STRIDES, strict=True):
            cells = (cells - 1) // stride + 1
            sizes.append(cells * round(up) if up >= 1 else cells // round(1 / up))
        return sizes


class AnchorClass(Section):
    """The anchors of one class: each size in each rotation at each place."""

    class_name: str
    anchor_sizes: Annotated[
        list[Annotated[list[Positive], Field(min_length=3, max_length=3)]], Field(min_length=1)
    ]  # metres: length, width, height
    anchor_rotations: Annotated[list[Number], Field(min_length=1)]  # radians
    anchor_bottom_heights: Annotated[list[Number], Field(min_length=1, max_length=1)]  # metres
    align_center: Flag = False  # anchors in the middle of their cells; else from edge to edge of the range
    feature_map_stride: Count = 2
    matched_threshold: Share
    unmatched_threshold: Share


class TargetAssigner(Section):
    NAME: Literal["AxisAlignedTargetAssigner"] = "AxisAlignedTargetAssigner"
    POS_FRACTION: Annotated[Number, _only(-1, "this assigner draws no sample of the anchors, all count")] = -1.0
    SAMPLE_SIZE: Count = 512  # of POS_FRACTION, so without effect
    NORM_BY_NUM_EXAMPLES: Annotated[Flag, _only(False, "the loss is divided by the positives, whatever this says")] = (
        False
    )
    MATCH_HEIGHT: Annotated[Flag, _only(False, "anchors are matched as seen from above")] = False
    BOX_CODER: Literal["ResidualCoder"] = "ResidualCoder"


class LossWeights(Section):
    cls_weight: NonNegative = 1.0
    loc_weight: NonNegative = 2.0
    dir_weight: NonNegative = 0.2
    code_weights: Annotated[list[NonNegative], Field(min_length=7, max_length=7)] = [1.0] * 7


class LossConfig(Section):
    LOSS_WEIGHTS: LossWeights = LossWeights()


class DenseHead(Section):
    """Class, box and direction of each anchor."""

    NAME: Literal["AnchorHeadSingle"]
    CLASS_AGNOSTIC: Annotated[Flag, _only(False, "each anchor scores every class")] = False
    USE_DIRECTION_CLASSIFIER: Flag = True
    DIR_OFFSET: Number = 0.78539  # radians
    DIR_LIMIT_OFFSET: Number = 0.0
    NUM_DIR_BINS: Annotated[Count, Field(ge=2)] = 2
    ANCHOR_GENERATOR_CONFIG: list[AnchorClass]  # one for each class
    TARGET_ASSIGNER_CONFIG: TargetAssigner = TargetAssigner()
    LOSS_CONFIG: LossConfig = LossConfig()


class NmsConfig(Section):
    MULTI_CLASSES_NMS: Annotated[Flag, _only(False, "boxes of all classes are suppressed together")] = False
    NMS_TYPE: Literal["nms_gpu", "nms_cpu"] = "nms_gpu"  # both: by rotated boxes, wherever the tensors are
    NMS_THRESH: Share = 0.01  # IoU seen from above
    NMS_PRE_MAXSIZE: Count = 4096
    NMS_POST_MAXSIZE: Count = 500


class PostProcessing(Section):
    RECALL_THRESH_LIST: list[Share] = Field(default_factory=list)  # of OpenPCDet's recall; raytrain's score is AP
    SCORE_THRESH: Share = 0.1
    OUTPUT_RAW_SCORE: Flag = False  # scores as logits
    EVAL_METRIC: Literal["kitti"] = "kitti"
    NMS_CONFIG: NmsConfig = NmsConfig()


class ModelOptions(Section):
    NAME: Literal["PointPillar"]
    VFE: Vfe
    MAP_TO_BEV: MapToBev
    BACKBONE_2D: Backbone2d
    DENSE_HEAD: DenseHead
    POST_PROCESSING: PostProcessing = PostProcessing()


def read_model_options(
    found: Mapping[str, Any], class_names: Sequence[str], grid_size: Sequence[int]
) -> tuple[ModelOptions, tuple[int, int]]:
    """The MODEL section, and the head's map size (nx, ny); ConfigError names each key that cannot be so.

    grid_size: pillars along x, y, z
    """
    options = read_section(ModelOptions, "MODEL", found)
    checks: list[Callable[[], str | None]] = [
        lambda: _widths(options),
        lambda: _classes(options.DENSE_HEAD.ANCHOR_GENERATOR_CONFIG, class_names),
        lambda: _sizes(options, grid_size),
    ]
    problems = [problem for problem in (check() for check in checks) if problem]
    if problems:
        raise ConfigError("\n".join(problems))
    return options, (options.BACKBONE_2D.map_size(grid_size[0])[0], options.BACKBONE_2D.map_size(grid_size[1])[0])


def _widths(options: ModelOptions) -> str | None:
    given, taken = options.VFE.NUM_FILTERS[-1], options.MAP_TO_BEV.NUM_BEV_FEATURES
    if given == taken:
        return None
    return f"MODEL.MAP_TO_BEV.NUM_BEV_FEATURES is {taken}, but VFE.NUM_FILTERS ends with {given}; they must be equal"


def _classes(anchors: Sequence[AnchorClass], class_names: Sequence[str]) -> str | None:
    named = [anchor.class_name for anchor in anchors]
    if sorted(named) == sorted(set(class_names)) and len(set(class_names)) == len(class_names):
        return None
    return (
        f"MODEL.DENSE_HEAD.ANCHOR_GENERATOR_CONFIG has anchors for {', '.join(named)}, but CLASS_NAMES are "
        f"{', '.join(class_names) or 'none'}; each class needs one entry of anchors"
    )


def _sizes(options: ModelOptions, grid_size: Sequence[int]) -> str | None:
    if grid_size[2] != 1:
        return (
            f"MODEL.MAP_TO_BEV: pillars reach from the bottom to the top of the range, but there are {grid_size[2]} "
            "voxels above each other; make VOXEL_SIZE as high as POINT_CLOUD_RANGE"
        )
    for axis, cells in zip("xy", grid_size, strict=False):
        sizes = options.BACKBONE_2D.map_size(cells)
        if len(set(sizes)) > 1 or not sizes[0]:
            return (
                f"MODEL.BACKBONE_2D makes maps of {sizes} cells of the {cells} pillars along {axis}, which do not fit "
                "together; choose a POINT_CLOUD_RANGE whose pillars its LAYER_STRIDES divide"
            )
        for anchor in options.DENSE_HEAD.ANCHOR_GENERATOR_CONFIG:
            if cells // anchor.feature_map_stride != sizes[0]:
                return (
                    f"MODEL.DENSE_HEAD.ANCHOR_GENERATOR_CONFIG: {anchor.class_name}'s feature_map_stride is "
                    f"{anchor.feature_map_stride}, but the backbone makes {sizes[0]} cells of {cells} along {axis}"
                )
    return None
