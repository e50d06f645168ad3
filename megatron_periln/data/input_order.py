"""The order in which the files of a folder, or of a glob, are taken."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache

__all__ = ["ORDERS", "in_order"]

ORDERS = ("natural", "bytes")
"""``part_2`` before ``part_10``, and the other way round."""


def in_order[Item](
    items: Iterable[Item],
    order: str,
    *,
    name: Callable[[Item], tuple[str, ...]],
    differs: Callable[[Item, Item], None] = lambda *_: None,
) -> list[Item]:
    """Return the items sorted by name.

    Parameters
    ----------
    items
        What to sort.
    order
        One of ``ORDERS``. Names that differ in zeros before a number alone are sorted by bytes in both.
    name
        The name of an item, in parts that are compared one after the other.
    differs
        Is called if the other order is another: with two items that it has the other way round.
    """
    by_bytes = sorted(items, key=name)
    natural = sorted(by_bytes, key=lambda item: [_numbers_read(part) for part in name(item)])
    chosen, other = (natural, by_bytes) if order == "natural" else (by_bytes, natural)
    for here, there in zip(chosen, other, strict=True):
        if name(here) != name(there):
            differs(here, there)
            break
    return chosen


@lru_cache(1 << 10)  # files of a folder share its parts
def _numbers_read(text: str) -> list[str | int]:
    """Return texts and numbers by turns, which compare with those of any other text."""
    return [int(part) if turn % 2 else part for turn, part in enumerate(re.split(r"(\d+)", text))]
