"""The monitor's scalars, heat maps and alerts in Megatron's TensorBoard writer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from megatron.training.global_vars import get_tensorboard_writer
from numpy.typing import NDArray

from megatron_periln.monitor.statistics import STATISTICS

__all__ = ["Board", "heat_map"]

_COLUMNS, _PIXELS = 96, 8


class Board:
    """Writes to Megatron's writer, if this process has it (``--tensorboard-dir``, last rank)."""

    def __init__(self) -> None:
        mapped = [name for name, statistic in STATISTICS.items() if statistic.mapped]
        self.history: dict[str, list[list[float | None]]] = {name: [] for name in mapped}

    def layers(
        self, iteration: int, layers: Sequence[int], statistics: dict[str, list[float | None]]
    ) -> None:
        """Write a scalar for each statistic of each layer, and the maps so far."""
        writer = get_tensorboard_writer()
        if writer is None:
            return
        for name, values in statistics.items():
            for layer, value in zip(layers, values, strict=True):
                if value is not None:
                    writer.add_scalar(f"monitor-{name}/layer-{layer:03d}", value, iteration)
        for name, history in self.history.items():
            history.append(statistics[name])
            if len(history) > _COLUMNS:
                del history[1::2]
            writer.add_image(f"monitor/{name}", heat_map(history), iteration, dataformats="HWC")

    def alert(self, iteration: int, message: str) -> None:
        """Write a text event."""
        writer = get_tensorboard_writer()
        if writer is not None:
            writer.add_text("monitor/alerts", message, iteration)


def heat_map(history: Sequence[Sequence[float | None]]) -> NDArray[np.uint8]:
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
    values = np.array(history, dtype=float).T[::-1]
    logarithms = np.log(values, out=np.full_like(values, np.nan), where=values > 0)
    drawn = np.isfinite(logarithms)
    low, high = (logarithms[drawn].min(), logarithms[drawn].max()) if drawn.any() else (0.0, 0.0)
    share = (np.where(drawn, logarithms, low) - low) / ((high - low) or 1.0)
    ends = np.array([[20, 24, 82], [196, 60, 96], [252, 232, 96]])
    colors = np.stack([np.interp(share, [0, 0.5, 1], ends[:, channel]) for channel in range(3)], axis=-1)
    colors[~drawn] = 160
    return colors.round().astype(np.uint8).repeat(_PIXELS, axis=0).repeat(_PIXELS, axis=1)
