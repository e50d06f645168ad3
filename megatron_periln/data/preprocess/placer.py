"""Where in the growing datasets chunks go."""

from __future__ import annotations

import numpy as np

from megatron_periln.data.preprocess.journal import Size

__all__ = ["Dataset", "Placer"]

Dataset = tuple[str, int]
"""A key, and the number of the dataset among those of its key."""


class Placer:
    """Decides where chunks go, one after the other.

    Parameters
    ----------
    dtype
        The dtype of the tokens.
    max_bin_size
        Bytes that a dataset's tokens may take before its key goes on in another; None for no limit.
    """

    def __init__(self, dtype: np.dtype, max_bin_size: int | None = None) -> None:
        self.itemsize, self._max = dtype.itemsize, max_bin_size
        self.ends: dict[Dataset, Size] = {}
        self._last: dict[str, int] = {}

    def place(self, sizes: dict[str, Size]) -> dict[Dataset, Size]:
        """Return the datasets that the next chunk goes to, and where in them it begins."""
        starts = {}
        for key, size in sizes.items():
            dataset = (key, self._last.setdefault(key, 0))
            start = self.ends.get(dataset, Size(0, 0, 0))
            full = self._max and (start.tokens + size.tokens) * self.itemsize > self._max
            if full and start.tokens and size.tokens:  # each dataset has tokens
                self._last[key] += 1
                dataset, start = (key, self._last[key]), Size(0, 0, 0)
            starts[dataset] = start
            self.ends[dataset] = start + size
        return starts
