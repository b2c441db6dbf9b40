from .broken.broken_dataset import BrokenDataset
from .dots.dots_dataset import DotsDataset

__all__ = {"DotsDataset": DotsDataset, "BrokenDataset": BrokenDataset}
