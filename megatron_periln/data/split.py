"""How data are divided into training, validation and test, as the flags say."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path

__all__ = ["is_divided", "names_parts", "parts_with_data", "shares"]

_PARTS = ("train", "valid", "test")


def shares(split: str) -> tuple[float, float, float] | None:
    """Return the shares of training, validation and test that ``--split`` says; they need not add up to one.

    Megatron takes every number that it finds: quotes, brackets and whatever stands between are nothing to it.
    So is a sign, or the e of ``1e-3``, in which it finds two numbers: these are none here.

    Parameters
    ----------
    split
        Such as ``969,30,1``.

    Returns
    -------
    None if it is not one to three numbers, or all are 0.
    """
    numbers = re.findall(r"[.0-9]+", split)
    between = re.sub(r"[.0-9]+", "", split)
    if re.search(r"[\w+-]", between) or not 1 <= len(numbers) <= 3:
        return None
    try:
        first, second, third = [*map(float, numbers), 0.0, 0.0][:3]
    except ValueError:
        return None
    return (first, second, third) if first + second + third > 0 else None


def is_divided(args: Namespace) -> bool:
    """Tell whether ``--split`` divides data into the three parts."""
    return args.data_path is not None or args.data_args_path is not None


def names_parts(args: Namespace) -> bool:
    """Tell whether flags name data for each part."""
    paths = [getattr(args, f"{part}_data_path") for part in _PARTS]
    return not is_divided(args) and any(path is not None for path in (*paths, args.per_split_data_args_path))


def parts_with_data(args: Namespace) -> dict[str, bool]:
    """Return whether there are data for ``train``, ``valid`` and ``test``.

    Parameters
    ----------
    args
        Megatron's, validated.
    """
    if is_divided(args):
        return dict(zip(_PARTS, map(bool, shares(args.split or "") or (1, 1, 1)), strict=True))
    if not names_parts(args):  # mock data, of which each part is as long as the others
        return dict.fromkeys(_PARTS, True)
    given = {part: getattr(args, f"{part}_data_path") for part in _PARTS}
    if args.per_split_data_args_path is not None:
        try:
            given = json.loads(Path(args.per_split_data_args_path).read_text())
        except (OSError, ValueError):  # said where the data are opened
            return dict.fromkeys(_PARTS, True)
    return {part: bool(given.get(part)) for part in _PARTS}
