"""Which layers are monitored: ``--monitor-layers``."""

from __future__ import annotations

import re

from megatron_periln.errors import UsageError

__all__ = ["chosen_layers"]


def chosen_layers(choice: str, num_layers: int) -> list[int]:
    """Return the numbers of the monitored layers, in order.

    Parameters
    ----------
    choice
        ``"all"``; ``"every:K"`` for layers ``K, 2K, ...`` and both ends; or numbers such as
        ``"0,1,12"``.
    num_layers
        ``L``. Layer 0 is the embedding's output, ``L + 1`` the final norm's.

    Raises
    ------
    UsageError
        If it is none of these, or names a layer that is not there.
    """
    last = num_layers + 1
    if choice == "all":
        return list(range(last + 1))
    if match := re.fullmatch(r"every:([1-9]\d*)", choice):
        return sorted({*range(0, last, int(match[1])), last})
    if not re.fullmatch(r"\d+(,\d+)*", choice):
        raise UsageError(
            f"--monitor-layers {choice} is none of all, every:K, and a list of numbers such as 0,1,12"
        )
    layers = sorted({int(number) for number in choice.split(",")})
    if layers[-1] > last:
        raise UsageError(
            f"--monitor-layers {choice}: there is no layer {layers[-1]}; "
            f"they are 0 (the embedding) to {last} (the final norm)"
        )
    return layers
