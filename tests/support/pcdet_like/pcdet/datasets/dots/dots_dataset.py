"""Dots on a field: a data set with pcdet's habits.

Its lists are pickled, its sampler walks through a shuffled list from where it stopped, its draws are numpy's global
ones, a sample without boxes gives another one, and its voxel generator is made with the first sample.
"""

import copy
import pickle

import numpy as np
import torch


class Sampler:
    def __init__(self, class_names, logger):
        self.db_infos = {
            name: [{"box": np.array([n, -n, 0, 1, 1, 1, 0.1 * n])} for n in range(6)] for name in class_names
        }
        self.sample_groups = {
            name: {"pointer": len(infos), "indices": np.arange(len(infos)), "sample_num": "2"}
            for name, infos in self.db_infos.items()
        }
        self.logger = logger

    def __getstate__(self):
        state = dict(self.__dict__)
        del state["logger"]
        return state

    def __call__(self, frame):
        for name, group in self.sample_groups.items():
            if group["pointer"] >= len(self.db_infos[name]):
                group["indices"], group["pointer"] = np.random.permutation(len(self.db_infos[name])), 0
            chosen = group["indices"][group["pointer"] : group["pointer"] + 2]
            group["pointer"] += 2
            frame["boxes"] = np.concatenate([frame["boxes"], [self.db_infos[name][n]["box"] for n in chosen]])
        return frame


def flip(frame):
    frame["boxes"][:, 1] *= np.random.choice([-1, 1])
    return frame


class Augmentor:
    def __init__(self, config, class_names, logger):
        self.logger = logger
        named = {"gt_sampling": Sampler(class_names, logger), "random_world_flip": flip}
        names = [each.NAME for each in config.AUG_CONFIG_LIST if each.NAME not in config.DISABLE_AUG_LIST]
        self.data_augmentor_queue = [named[name] for name in names]

    def __getstate__(self):
        state = dict(self.__dict__)
        del state["logger"]
        return state


class Generator:
    def __reduce__(self):
        raise TypeError("a voxel generator cannot be pickled")


class Processor:
    voxel_generator = None


class DotsDataset(torch.utils.data.Dataset):
    def __init__(self, dataset_cfg=None, class_names=None, training=True, root_path=None, logger=None):
        self.dataset_cfg, self.class_names, self.training, self.logger = dataset_cfg, class_names, training, logger
        infos = root_path / f"dots_infos_{'train' if training else 'val'}.pkl"
        self.dots_infos = pickle.loads(infos.read_bytes()) if infos.exists() else []
        self.data_augmentor = Augmentor(dataset_cfg.DATA_AUGMENTOR, class_names, logger) if training else None
        self.data_processor = Processor()

    def __getstate__(self):
        state = dict(self.__dict__)
        del state["logger"]
        return state

    def __len__(self):
        return len(self.dots_infos)

    def __getitem__(self, index):
        self.logger.debug("frame %d", index)
        info = copy.deepcopy(self.dots_infos[index])
        self.data_processor.voxel_generator = self.data_processor.voxel_generator or Generator()
        frame = {"frame_id": info["frame_id"], "boxes": np.asarray(info["boxes"], dtype=np.float).reshape(-1, 7)}
        if self.training and not len(frame["boxes"]):
            return self.__getitem__(np.random.randint(len(self)))
        for augment in self.data_augmentor.data_augmentor_queue if self.training else ():
            frame = augment(frame)
        points = frame["boxes"][:, :3].repeat(5, axis=0) + np.random.normal(0, 0.1, (5 * len(frame["boxes"]), 3))
        return {
            "frame_id": info["frame_id"],
            "points": points,
            "gt_boxes": frame["boxes"],
            "image_shape": np.array([4, 5]),
        }

    @staticmethod
    def collate_batch(batch_list, _unused=False):
        points = [np.pad(each["points"], ((0, 0), (1, 0)), constant_values=n) for n, each in enumerate(batch_list)]
        most = max(len(each["gt_boxes"]) for each in batch_list)
        boxes = np.zeros((len(batch_list), most, 7))
        for n, each in enumerate(batch_list):
            boxes[n, : len(each["gt_boxes"])] = each["gt_boxes"]
        return {
            "frame_id": np.array([each["frame_id"] for each in batch_list]),
            "points": np.concatenate(points),
            "gt_boxes": boxes,
            "image_shape": np.stack([each["image_shape"] for each in batch_list]),
            "batch_size": len(batch_list),
        }

    @staticmethod
    def generate_prediction_dicts(batch_dict, pred_dicts, class_names, output_path=None):
        return [
            {
                "frame_id": batch_dict["frame_id"][n],
                "name": np.array(class_names)[found["pred_labels"].cpu().numpy() - 1],
                "boxes_lidar": found["pred_boxes"].cpu().numpy(),
            }
            for n, found in enumerate(pred_dicts)
        ]

    def evaluation(self, det_annos, class_names, **kwargs):
        assert kwargs["eval_metric"] == "dots"
        (kwargs["output_path"] / "dots.txt").write_text("found")
        assert [each["frame_id"] for each in det_annos] == [info["frame_id"] for info in self.dots_infos]
        return "dots found: all", {"dots": np.float64(sum(len(each["name"]) for each in det_annos))}


def create_dots_infos(dataset_cfg, class_names, data_path, save_path, workers=4):
    for split in ("train", "val"):
        frames = [{"frame_id": f"{n:03d}", "boxes": np.ones((n % 3, 7)) * [n, n, 0, 1, 1, 1, 0]} for n in range(8)]
        (save_path / f"dots_infos_{split}.pkl").write_bytes(pickle.dumps(frames))
