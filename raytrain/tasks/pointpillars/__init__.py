"""PointPillars on LiDAR scenes, simulated or KITTI's."""
