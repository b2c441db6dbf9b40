"""OpenPCDet's own models, data and configs, trained here: `TASK: raytrain.tasks.openpcdet:OpenPCDetTask`."""

from raytrain.tasks.openpcdet.task import OpenPCDetTask

__all__ = ["OpenPCDetTask"]
