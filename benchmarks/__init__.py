"""What raytrain is measured by: `python -m benchmarks` in the root of the repository runs all of it."""
