"""The package's version, importable without torch or Megatron."""

__version__ = "0.1.0"
