"""The monitor's scalars, heat maps and alerts in Megatron's TensorBoard writer."""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from megatron.training.global_vars import get_tensorboard_writer
from numpy.typing import NDArray

from megatron_periln.monitor.checksums import masked_crc32c
from megatron_periln.monitor.statistics import STATISTICS
from megatron_periln.patches import training_loop

__all__ = ["Board", "encode_map", "heat_map"]

_COLUMNS, _PIXELS = 96, 8
_SCALE = [[20, 24, 82], [196, 60, 96], [252, 232, 96]]
_GREY = [160, 160, 160]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]


class Board:
    """Writes to Megatron's writer, if this process has it (``--tensorboard-dir``, last rank).

    An interval is one event: a scalar for each statistic of each layer, by its name, and maps of the run so
    far whenever that has become an eighth longer, and at its end: TensorBoard shows ten of them.
    """

    def __init__(self) -> None:
        mapped = [name for name, statistic in STATISTICS.items() if statistic.mapped]
        self.history: dict[str, list[Floats]] = {name: [] for name in mapped}
        self._intervals, self._next_map = 0, 1
        self._scalars_of: Any = None
        self._scalars: Any = None
        self._values: list[Any] = []
        if get_tensorboard_writer() is not None:
            training_loop.sum_events_with(masked_crc32c)

    def layers(
        self,
        iteration: int,
        layers: Sequence[int],
        statistics: dict[str, list[float | None]],
        last: bool = False,
    ) -> None:
        """Write a scalar for each statistic of each layer, and the maps if they are due or it is the last."""
        writer = get_tensorboard_writer()
        if writer is None:
            return
        event = self._summary(layers, statistics)
        for name, history in self.history.items():
            history.append(np.array(statistics[name], dtype=float))
            if len(history) > _COLUMNS:
                del history[1::2]
        self._intervals += 1
        if last or self._intervals >= self._next_map:
            self._next_map = self._intervals + max(1, self._intervals // 8)
            for name, history in self.history.items():
                cells = _cells(history)
                image = event.value.add(tag=f"monitor/{name}").image
                image.height, image.width, image.colorspace = *(_PIXELS * side for side in cells.shape), 3
                image.encoded_image_string = encode_map(cells)
        writer._get_file_writer().add_summary(event, iteration)

    def _summary(self, layers: Sequence[int], statistics: dict[str, list[float | None]]) -> Any:
        """Return a summary of scalars: that of the interval before with other values, if it has the same."""
        # TensorBoard, half a second, is imported by runs that write for it.
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = [value for values in statistics.values() for value in values]
        missing = [place for place, value in enumerate(numbers) if value is None]
        if self._scalars_of != (layers, list(statistics), missing):
            self._scalars_of = list(layers), list(statistics), missing
            tags = [f"monitor-{name}/layer-{layer:03d}" for name in statistics for layer in layers]
            there = [tag for tag, value in zip(tags, numbers, strict=True) if value is not None]
            self._scalars = Summary(value=[Summary.Value(tag=tag) for tag in there])
            self._values = list(self._scalars.value)
        del self._scalars.value[len(self._values) :]  # the maps of the interval before
        present = numbers if not missing else (value for value in numbers if value is not None)
        for value, number in zip(self._values, present, strict=True):
            value.simple_value = number
        return self._scalars

    def alert(self, iteration: int, message: str) -> None:
        """Write a text event."""
        writer = get_tensorboard_writer()
        if writer is not None:
            writer.add_text("monitor/alerts", message, iteration)


def heat_map(history: Sequence[Sequence[float | None] | Floats]) -> Bytes:
    """Draw values by depth over training, on a logarithmic scale from dark blue to yellow.

    Parameters
    ----------
    history
        The values of each layer, one list a monitored iteration, oldest first.

    Returns
    -------
    ndarray
        ``[8 * layers, 8 * iterations, 3]``; the first layer is at the bottom. Values that are
        missing, not finite or not positive are grey.
    """
    return _colors()[_cells(history)].repeat(_PIXELS, axis=0).repeat(_PIXELS, axis=1)


@functools.cache  # for small models it would be most of a map's time
def _colors() -> Bytes:
    """Return grey, of what has no logarithm, and the scale, ``[256, 3]``."""
    shares = np.linspace(0, 1, 255)
    scale = [np.interp(shares, [0, 0.5, 1], channel) for channel in zip(*_SCALE, strict=True)]
    return np.concatenate([[_GREY], np.stack(scale, axis=1)]).round().astype(np.uint8)


def _cells(history: Sequence[Sequence[float | None] | Floats]) -> Bytes:
    """Return the number of each cell's colour, ``[layers, iterations]``."""
    values = np.array(history, dtype=float).T[::-1]
    logarithms = np.log(values, out=np.full_like(values, np.nan), where=values > 0)
    drawn = np.isfinite(logarithms)
    low, high = (logarithms[drawn].min(), logarithms[drawn].max()) if drawn.any() else (0.0, 0.0)
    share = (np.where(drawn, logarithms, low) - low) / ((high - low) or 1.0)
    return np.where(drawn, 1 + (254 * share).round(), 0).astype(np.uint8)


def encode_map(cells: Bytes) -> bytes:
    """Return `heat_map` of cells as a PNG whose rows say how they differ from those above them."""
    rows, columns = cells.shape
    above = np.concatenate([np.zeros((1, columns), np.uint8), cells[:-1]])
    lines = np.zeros((rows, _PIXELS, 1 + _PIXELS * columns), np.uint8)
    lines[:, :, 0] = 2  # the filter "up"
    lines[:, 0, 1:] = (cells - above).repeat(_PIXELS, axis=1)
    header = struct.pack(">2I5B", _PIXELS * columns, _PIXELS * rows, 8, 3, 0, 0, 0)
    chunks = {b"IHDR": header, b"PLTE": _colors().tobytes(), b"IDAT": zlib.compress(lines, 1), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )
