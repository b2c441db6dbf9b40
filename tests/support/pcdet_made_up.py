"""Any config of OpenPCDet's on made-up scenes of a small field: what its models compute, without its data.

Needs pcdet, so nothing but the tests marked `pcdet` use it.
"""

from pathlib import Path

import numpy as np

from raytrain.tasks.openpcdet import OpenPCDetTask

SIDE_M = 12.8  # of the field
NUM_SCENES = 2
NUM_POINTS = 3000  # on the ground, unless a config samples points: then twice as many as it samples
FEWER = {"ROI_PER_IMAGE": 16, "NMS_POST_MAXSIZE": 32, "NUM_KEYPOINTS": 256}  # half of a minute's work in some models
SIZES = {"ped": (0.8, 0.7, 1.75), "cyc": (1.8, 0.7, 1.7), "bic": (1.8, 0.7, 1.7), "cone": (0.4, 0.4, 1.0)}


def small(cfg):
    """Overrides (dotted key, value) that put a config on a small field: as fine cells, fewer of them."""
    data = cfg.DATA_CONFIG
    low, high = np.array(data["POINT_CLOUD_RANGE"]).reshape(2, 3)
    sizes = [p["VOXEL_SIZE"] for p in data["DATA_PROCESSOR"] if "VOXEL_SIZE" in p]
    cell = sizes[0][0] if sizes else 0.1
    head = cfg.MODEL["DENSE_HEAD"]["NAME"] if "DENSE_HEAD" in cfg.MODEL else ""
    least = 64 if head.startswith("Anchor") else 192  # the others take the 500 best of the cells, of 8 x 8 each
    cells = max(least, 64 * round(SIDE_M / cell / 64))
    side = cells * cell
    x = 0.0 if low[0] == 0 else -side / 2
    small_range = [x, -side / 2, low[2], x + side, side / 2, high[2]]
    small_range = [round(float(each), 4) for each in small_range]
    augmentor = data["DATA_AUGMENTOR"]
    listed = augmentor if isinstance(augmentor, list) else augmentor["AUG_CONFIG_LIST"]
    kept = [each for each in listed if each["NAME"] in ("random_world_flip", "random_world_rotation")]
    values = {
        "DATA_CONFIG.DATASET": "MadeUpDataset",
        "DATA_CONFIG.POINT_CLOUD_RANGE": small_range,
        "DATA_CONFIG.DATA_AUGMENTOR": {"DISABLE_AUG_LIST": [], "AUG_CONFIG_LIST": kept},
    }
    old = [round(float(each), 4) for each in (*low, *high)]
    old_cells = round((high[0] - low[0]) / cell)

    def moved(tree, path):
        """Every other place that names the range, or the number of cells."""
        if isinstance(tree, dict):
            for key, value in tree.items():
                if isinstance(value, list) and len(value) == 6 and _same(value[:2] + value[3:5], old[:2] + old[3:5]):
                    values[f"{path}.{key}"] = [*small_range[:2], value[2], *small_range[3:5], value[5]]
                elif key in FEWER and isinstance(value, int):
                    values[f"{path}.{key}"] = min(value, FEWER[key])
                elif key in ("INPUT_SHAPE", "sparse_shape") and isinstance(value, list):
                    values[f"{path}.{key}"] = [cells if each == old_cells else each for each in value]
                else:
                    moved(value, f"{path}.{key}")

    moved(cfg.MODEL, "MODEL")
    return values


def _same(a, b):
    return all(isinstance(each, int | float) for each in a) and np.allclose(a, b)


class MadeUpTask(OpenPCDetTask):
    """OpenPCDetTask on scenes of boxes with points in them, which pcdet's own augmentors and processors go over."""

    def build_dataset(self, split):
        self.checkout.use()
        from pcdet import datasets

        datasets.__all__["MadeUpDataset"] = made_up_dataset()
        return super().build_dataset(split)

    def collate(self, samples):
        self.checkout.use()
        from pcdet.datasets import DatasetTemplate

        from raytrain.tasks.openpcdet.frames import typed

        return typed(DatasetTemplate.collate_batch(samples))


def made_up_dataset():
    from pcdet.datasets import DatasetTemplate

    class MadeUpDataset(DatasetTemplate):
        def __init__(self, dataset_cfg, class_names, training, root_path, logger):
            super().__init__(dataset_cfg, class_names, training, Path(), logger)

        def __len__(self):
            return NUM_SCENES

        def __getitem__(self, index):
            rng = np.random.default_rng(index)
            low, high = self.point_cloud_range[:3], self.point_cloud_range[3:]
            names = np.array(
                [self.class_names[n % len(self.class_names)] for n in range(max(6, len(self.class_names)))]
            )
            sizes = np.array([next((s for k, s in SIZES.items() if k in n.lower()), (3.9, 1.7, 1.6)) for n in names])
            xy = rng.uniform(low[:2] + 1.5, high[:2] - 1.5, (len(names), 2))
            ground = max(low[2] + 0.2, -1.8)
            boxes = np.column_stack([xy, ground + sizes[:, 2] / 2, sizes, rng.uniform(-3.1, 3.1, len(names))])
            inside = rng.uniform(-0.5, 0.5, (len(names), 60, 3)) * sizes[:, None]
            cos, sin = np.cos(boxes[:, 6, None]), np.sin(boxes[:, 6, None])
            turned = [inside[..., 0] * cos - inside[..., 1] * sin, inside[..., 0] * sin + inside[..., 1] * cos]
            objects = np.stack([*turned, inside[..., 2]], axis=2) + boxes[:, None, :3]
            floor = np.column_stack(
                [rng.uniform(low[:2], high[:2], (NUM_POINTS, 2)), rng.normal(ground, 0.03, NUM_POINTS)]
            )
            xyz = np.vstack([objects.reshape(-1, 3), floor])
            features = self.dataset_cfg.POINT_FEATURE_ENCODING.src_feature_list
            points = np.column_stack([xyz, rng.random((len(xyz), len(features) - 3))]).astype(np.float32)
            if "timestamp" in features:
                points[:, features.index("timestamp")] = 0
            if self.dataset_cfg.get("PRED_VELOCITY") or self.dataset_cfg.get("TRAIN_WITH_SPEED"):
                boxes = np.column_stack([boxes, rng.normal(0, 1, (len(names), 2))])
            frame = {
                "points": points,
                "gt_boxes": boxes.astype(np.float32),
                "gt_names": names,
                "frame_id": f"{index:06d}",
            }
            return self.prepare_data(data_dict=frame)

        def evaluation(self, det_annos, class_names, **kwargs):
            assert len(det_annos) == NUM_SCENES and kwargs["output_path"].is_dir()
            return "made up", {"boxes": sum(len(each["name"]) for each in det_annos)}

    MadeUpDataset.__qualname__ = "MadeUpDataset"
    return MadeUpDataset
