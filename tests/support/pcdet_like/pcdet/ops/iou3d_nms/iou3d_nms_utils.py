import torch

from . import iou3d_nms_cuda


def kept_of(boxes, threshold):
    keep = torch.LongTensor(boxes.size(0))
    count = iou3d_nms_cuda.nms_gpu(boxes.contiguous(), keep, threshold)
    return keep[:count].cuda()
