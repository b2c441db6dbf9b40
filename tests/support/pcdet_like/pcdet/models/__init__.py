import torch
from torch import nn

from ..ops.iou3d_nms.iou3d_nms_utils import kept_of


class Dots(nn.Module):
    def __init__(self, model_cfg, num_class, dataset):
        super().__init__()
        self.post = model_cfg.POST_PROCESSING
        self.layer = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.register_buffer("global_step", torch.LongTensor(1).zero_())
        self.places = torch.arange(3.0).cuda()  # no buffer: it stays where it is put here

    def update_global_step(self):
        self.global_step += 1

    def forward(self, batch_dict):
        assert batch_dict["points"].dtype == torch.float32 and batch_dict["image_shape"].dtype == torch.int32
        heights = torch.cuda.FloatTensor(len(batch_dict["points"])).zero_() + self.places.sum()
        batch_dict["height"] = self.layer(batch_dict["points"][:, 1:4])[:, 0] + 0 * heights
        if self.training:
            loss = batch_dict["height"].square().mean()
            return {"loss": loss}, {"loss_height": loss.item()}, {}
        found = []
        for boxes in batch_dict["gt_boxes"]:
            boxes = boxes[boxes[:, 3] > 0]  # those of no size fill up the batch
            boxes = boxes[kept_of(boxes, 0.5)]
            found.append({"pred_boxes": boxes, "pred_labels": torch.ones(len(boxes), dtype=torch.int64)})
        return found, {"gt": 4, "roi_0.5": 0, "rcnn_0.5": 2}


def build_network(model_cfg, num_class, dataset):
    assert not hasattr(dataset, "dataset"), "pcdet's own data set, not what raytrain wraps it in"
    return Dots(model_cfg, num_class, dataset)
