"""PointPillars on LiDAR scenes, simulated or KITTI's: `TASK: raytrain.tasks.pointpillars.task:PointPillars`."""
