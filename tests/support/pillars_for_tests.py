"""A small PointPillars to train in tests: a coarse grid, few beams, and all augmentations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tasks_for_tests import pass_gate, write_down

from raytrain import ModelReturn
from raytrain.tasks.pointpillars.task import PointPillars

CLASS_NAMES = ["Car", "Pedestrian"]
NUM_SCENES = 22
DATA_CONFIG: dict[str, Any] = {
    "SOURCE": "simulated",
    "SIMULATION": {
        "NUM_SCENES": {"train": NUM_SCENES, "val": 4},
        "BEAMS": 16,
        "AZIMUTH_STEP_DEG": 1.0,
        "FIELD_OF_VIEW_DEG": 90,
        "EXTENT_M": [4, -8, 22, 8],
    },
    "POINT_CLOUD_RANGE": [0, -10.24, -3, 20.48, 10.24, 1],
    "DATA_AUGMENTOR": {
        "AUG_CONFIG_LIST": [
            {
                "NAME": "gt_sampling",
                "USE_ROAD_PLANE": True,
                "PREPARE": {"filter_by_min_points": ["Car:5", "Pedestrian:3"]},
                "NUM_FRAMES": 10,
                "SAMPLE_GROUPS": ["Car:3", "Pedestrian:2"],
            },
            {"NAME": "random_world_flip", "ALONG_AXIS_LIST": ["x"]},
            {"NAME": "random_world_rotation", "WORLD_ROT_ANGLE": [-0.2, 0.2]},
            {"NAME": "random_world_scaling", "WORLD_SCALE_RANGE": [0.95, 1.05]},
        ]
    },
    "DATA_PROCESSOR": [
        {"NAME": "mask_points_and_boxes_outside_range", "REMOVE_OUTSIDE_BOXES": True},
        {"NAME": "shuffle_points", "SHUFFLE_ENABLED": {"train": True, "test": False}},
        {
            "NAME": "transform_points_to_voxels",
            "VOXEL_SIZE": [0.64, 0.64, 4],
            "MAX_POINTS_PER_VOXEL": 8,
            "MAX_NUMBER_OF_VOXELS": {"train": 600, "test": 600},
        },
    ],
}


def anchors(name: str, size: list[float], bottom_m: float, matched: float) -> dict[str, Any]:
    return {
        "class_name": name,
        "anchor_sizes": [size],
        "anchor_rotations": [0, 1.57],
        "anchor_bottom_heights": [bottom_m],
        "matched_threshold": matched,
        "unmatched_threshold": matched - 0.15,
    }


MODEL: dict[str, Any] = {
    "NAME": "PointPillar",
    "VFE": {"NAME": "PillarVFE", "NUM_FILTERS": [8]},
    "MAP_TO_BEV": {"NAME": "PointPillarScatter", "NUM_BEV_FEATURES": 8},
    "BACKBONE_2D": {
        "NAME": "BaseBEVBackbone",
        "LAYER_NUMS": [1, 1],
        "LAYER_STRIDES": [2, 2],
        "NUM_FILTERS": [8, 8],
        "UPSAMPLE_STRIDES": [1, 2],
        "NUM_UPSAMPLE_FILTERS": [8, 8],
    },
    "DENSE_HEAD": {
        "NAME": "AnchorHeadSingle",
        "ANCHOR_GENERATOR_CONFIG": [
            anchors("Car", [3.9, 1.6, 1.56], -1.78, 0.6),
            anchors("Pedestrian", [0.8, 0.6, 1.73], -1.78, 0.5),
        ],
    },
    "POST_PROCESSING": {},
}
CONFIG: dict[str, Any] = {
    "TASK": "pillars_for_tests:GatedPillars",
    "CLASS_NAMES": CLASS_NAMES,
    "DATA_CONFIG": DATA_CONFIG,
    "MODEL": MODEL,
    "HOOK": {"DisableAugmentationHook": {"DISABLE_AUG_LIST": ["gt_sampling"], "NUM_LAST_EPOCHS": 1}},
}


class GatedPillars(PointPillars):
    """Each training pass is written down, and held, in the folder `gate` beside OUTPUT, if there is one."""

    def model_func(self, model: torch.nn.Module, batch: dict[str, Any]) -> ModelReturn:
        if model.training:
            gate, step = Path(self.cfg.OUTPUT).parent / "gate", int(model.global_step)
            write_down(gate, step, 0, [int(frame.name) for frame in batch["frame"]])
            pass_gate(gate, step)
        return super().model_func(model, batch)
