"""Progress on a terminal; elsewhere a line now and then, if asked for."""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["Progress"]


class Progress:
    """Shows how far preprocessing is, on stderr.

    Parameters
    ----------
    total
        Size of the inputs, in bytes.
    log_interval
        Number of documents between two lines where stderr is not a terminal; None for none.
    """

    def __init__(self, total: int, log_interval: int | None = None) -> None:
        self._log_interval = log_interval
        self._started = time.monotonic()
        self._documents = self._bytes = self._tokens = self._errors = 0
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm  # not at the top: its import takes 40 ms, and jobs show no bar

            self._bar = tqdm(total=total or None, unit="B", unit_scale=True, unit_divisor=1000, smoothing=0.1)

    def add(
        self, *, weight: int, documents: int, bytes: int, tokens: int, errors: int, new: bool = True
    ) -> None:
        """Count a chunk.

        Parameters
        ----------
        weight
            Its size in the inputs, in bytes.
        documents, bytes, tokens, errors
            How many documents it has, their size, their tokens, and how many were skipped.
        new
            Whether it was encoded now, not in a run before.
        """
        logged = self._documents // (self._log_interval or sys.maxsize)
        self._errors += errors
        if new:
            self._documents += documents
            self._bytes += bytes
            self._tokens += tokens
        if self._bar is not None:
            if new:
                seconds = max(time.monotonic() - self._started, 1e-9)
                errors_ = f", {self._errors} errors" if self._errors else ""
                self._bar.set_postfix_str(
                    f"{self._tokens / seconds / 1e6:.2f}M tokens/s{errors_}", refresh=False
                )
                self._bar.update(weight)
            else:
                self._bar.initial += weight
                self._bar.n += weight
        elif self._log_interval and self._documents // self._log_interval > logged:
            seconds = time.monotonic() - self._started
            print(
                f"Processed {self._documents} documents ({self._documents / seconds:.1f} docs/s, "
                f"{self._bytes / seconds / 1024**2:.2f} MB/s).",
                file=sys.stderr,
            )

    def note(self, message: str) -> None:
        """Print a line that is no error."""
        if self._bar is not None:
            self._bar.clear()
        print(f"note: {message}", file=sys.stderr, flush=True)

    def reset(self) -> None:
        """Begin again."""
        self._documents = self._bytes = self._tokens = self._errors = 0
        if self._bar is not None:
            self._bar.reset()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.leave = False
            self._bar.close()
