"""OpenPCDet's own models, data and configs, trained here: `TASK: raytrain.tasks.openpcdet:OpenPCDetTask`."""
