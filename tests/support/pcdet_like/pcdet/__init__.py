"""A package with pcdet's surface and habits, and little behind it: what OpenPCDetTask must cope with, in seconds."""

from .version import __version__

__all__ = ["__version__"]
