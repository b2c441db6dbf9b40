"""pcdet.version, which its setup.py writes: absent where nothing was built."""

__version__ = "0.6.0"
