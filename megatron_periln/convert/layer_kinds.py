"""What differs from layer to layer in attention: windows, and whether positions rotate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_periln.convert.targets import Target
from megatron_periln.errors import UsageError

__all__ = ["LayerKinds"]

_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class LayerKinds:
    """The kinds of a model's attention layers.

    Parameters
    ----------
    window
        Tokens that a layer with a window sees, its own included; None if no layer has one.
    windowed
        Which layers have it.
    rotated
        In which layers queries and keys rotate.
    """

    windowed: tuple[bool, ...]
    rotated: tuple[bool, ...]
    window: int | None = None

    @property
    def plain(self) -> bool:
        """Tell whether all layers see all tokens before, and rotate."""
        return all(self.rotated) and not any(self.windowed)

    def or_none(self) -> LayerKinds | None:
        """Return None if all layers are plain."""
        return None if self.plain else self

    @staticmethod
    def all_plain(count: int) -> LayerKinds:
        """Return those of a model whose layers are all alike."""
        return LayerKinds(windowed=(False,) * count, rotated=(True,) * count)

    @staticmethod
    def of(core: Any) -> LayerKinds:
        """Return those that Megatron's ``TransformerConfig`` says."""
        count, skip = core.num_layers, core.window_attn_skip_freq
        unrotated = core.no_rope_freq or [0] * count  # a list, after the configuration was made
        windowed = (False,) * count
        if core.window_size and core.window_size[0] >= 0:  # -1 is all tokens before
            windowed = _windowed(skip, count)
        return LayerKinds(
            windowed=windowed,
            rotated=tuple(not each for each in unrotated),
            window=core.window_size[0] + 1 if any(windowed) else None,
        )

    def flags(self) -> list[list[str]]:
        """Return Megatron's flags, each with its value."""
        found = []
        if self.window is not None:
            found.append(["--window-size", f"{self.window - 1},0"])
            if not all(self.windowed):
                found.append(["--window-attn-skip-freq", _listed(self.windowed)])
        if not all(self.rotated):
            found.append(["--no-rope-freq", _listed([not each for each in self.rotated])])
        return found

    def settings(self, target: Target, max_positions: int) -> dict[str, Any]:
        """Return what config.json says of them, where the target supports all."""
        if target.layer_kinds is None:
            return {}
        windowed, window = self.windowed, self.window
        if target.layer_kinds == "rotates in windows" and self.plain:
            windowed, window = self.rotated, max_positions
        period = {} if target.window_period is None else {target.window_period: _period(windowed)}
        return {
            "layer_types": [_SLIDING if each else _FULL for each in windowed],
            "sliding_window": window,
            **period,
        }

    @staticmethod
    def of_settings(config: Any, target: Target) -> LayerKinds:
        """Return those of a model of transformers.

        Raises
        ------
        UsageError
            For a kind of layer that Megatron has nothing for.
        """
        plain = LayerKinds.all_plain(config.num_hidden_layers)
        if target.layer_kinds is None:
            return plain
        kinds: Sequence[str] = config.layer_types or [_FULL] * config.num_hidden_layers
        if others := sorted(set(kinds) - {_SLIDING, _FULL}):
            raise UsageError(f"the model has layer_types {', '.join(others)}, which can't be imported")
        windowed = tuple(kind == _SLIDING for kind in kinds)
        rotated = windowed
        if target.layer_kinds == "rotates everywhere":
            rotated = plain.rotated
        elif target.layer_kinds == "rotates in windows, if there are" and config.sliding_window is None:
            windowed, rotated = plain.windowed, plain.rotated
        window = config.sliding_window if any(windowed) else None
        if any(windowed) and not window:
            raise UsageError(f"the model has layer_types {_SLIDING} and sliding_window {window}")
        if window is not None and window >= config.max_position_embeddings and all(windowed):
            return plain
        return LayerKinds(windowed=windowed, rotated=rotated, window=window)

    def unsupported_by(self, target: Target) -> Iterator[tuple[str, str]]:
        """Yield what ``target`` doesn't support: the reason, and what to train with instead."""
        name, kinds = target.name, target.layer_kinds
        if self.plain:
            return
        if kinds is None:
            if self.window is not None:
                yield f"its attention has a window, and {name}'s has none", "no --window-size"
            if not all(self.rotated):
                yield f"some of its layers have no positions, and all of {name}'s do", "no --no-rope-freq"
        elif kinds == "rotates everywhere":
            if not all(self.rotated):
                yield f"some of its layers have no positions, and all of {name}'s do", "no --no-rope-freq"
        elif self.rotated != self.windowed:
            yield (
                f"{name} has positions in the layers with a window and in no others, and it does not",
                f"--no-rope-freq {_listed([not each for each in self.windowed])}"
                if self.window is not None
                else "--window-size as well as --no-rope-freq",
            )
        elif kinds == "rotates in windows, if there are" and self.window is None:
            yield f"its layers have no positions, and without windows all of {name}'s do", "no --no-rope-freq"


def _windowed(skip: int | Sequence[int] | None, count: int) -> tuple[bool, ...]:
    """Return which layers have a window, as ``is_layer_window_attention`` of Megatron does."""
    if skip is None:
        return (True,) * count
    if isinstance(skip, int):
        return tuple((layer + 1) % skip != 0 for layer in range(count))
    return tuple(bool(each) for each in skip)


def _period(windowed: Sequence[bool]) -> int | None:
    """Return which one of so many layers has no window; None if no layer has one, or in another order."""
    period = windowed.index(False) + 1 if False in windowed else len(windowed) + 1
    regular = all(each == bool((layer + 1) % period) for layer, each in enumerate(windowed))
    return period if regular and period > 1 else None


def _listed(values: Sequence[bool]) -> str:
    return str([int(each) for each in values]).replace(" ", "")
