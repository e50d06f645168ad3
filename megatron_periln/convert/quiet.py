"""Tools that speak, and a Megatron that does not."""

from __future__ import annotations

import logging
import warnings

__all__ = ["quiet_megatron"]


def quiet_megatron() -> None:
    """Keep Megatron's and torch's warnings from the output of a tool."""
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    logging.getLogger("megatron").setLevel(logging.ERROR)
