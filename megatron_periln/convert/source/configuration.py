"""The config.json of a model to be imported: what it says, and what of it nobody can follow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_periln.errors import UsageError

__all__ = ["Statements", "refuse_ids_out_of_range", "refuse_sizes_of_nothing"]

_QUANTIZATION = ("quantization_config", "quantization", "compression_config")
"""Keys under which quantized models say so: those of transformers, MLX and compressed-tensors."""

_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings"),
)

_DETAILS = ("load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "bits", "fmt", "format")
"""What is told of a method beside its name."""


@dataclass(frozen=True)
class Statements:
    """What a config.json says in so many words, without transformers' defaults.

    Parameters
    ----------
    path
        The file.
    values
        What it holds.
    """

    path: Path
    values: Mapping[str, Any]

    @staticmethod
    def read(model: Path) -> Statements:
        """Read the config.json in a folder.

        Raises
        ------
        UsageError
            If it is no JSON object, or says what leads to an error in transformers or to other weights than
            those that were trained: quantized ones.
        """
        path = model / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} can't be read: {error}; download it again") from error
        if not isinstance(values, dict):
            raise UsageError(f"{path} holds no JSON object; download it again")
        said = Statements(path, values)
        said._refuse_quantized()
        said._refuse_exaone4_without_layer_types()
        return said

    def quote(self, key: str, value: Any) -> str:
        """Return a clause with a key and the value that transformers makes of it."""
        taken = json.dumps(value, default=str)
        if self.values.get(key) == value:
            return f"{self.path} has {key} {taken}"
        written = f"{key} {json.dumps(self.values[key])}" if key in self.values else f"no {key}"
        return f"{self.path} has {written}, for which transformers takes {taken}"

    def _refuse_quantized(self) -> None:
        for key in _QUANTIZATION:
            if settings := self.values.get(key):
                raise UsageError(
                    f"{self.path} has a {key} ({_method(settings)}): quantized weights are not imported; "
                    "give the model from which they were made, or dequantize it in transformers "
                    "(model.dequantize(), then save_pretrained)"
                )

    def _refuse_exaone4_without_layer_types(self) -> None:
        """Refuse what Exaone4Config divides by zero for (transformers 5.23)."""
        if self.values.get("model_type") != "exaone4" or self.values.get("layer_types") is not None:
            return
        for key, empty in (("sliding_window", (None,)), ("sliding_window_pattern", (None, 0))):
            if key in self.values and self.values[key] in empty:
                layers = self.values.get("num_hidden_layers", "num_hidden_layers")
                value = json.dumps(self.values[key])
                raise UsageError(
                    f"{self.path} has {key} {value} and no layer_types, which transformers can't read; if "
                    f'there is no window, add "layer_types" there, {layers} times "full_attention"'
                )


def _method(settings: Any) -> str:
    """Return the name of a quantization method, with the widths and formats that are given beside it."""
    if not isinstance(settings, Mapping):
        return str(settings)
    # transformers writes _load_in_8bit.
    said = {name.lstrip("_"): value for name, value in settings.items()}
    bitsandbytes = said.get("load_in_8bit") or said.get("load_in_4bit")
    method = said.get("quant_method") or ("bitsandbytes" if bitsandbytes else "no method named")
    details = [f"{name} {json.dumps(said[name])}" for name in _DETAILS if said.get(name)]
    return ", ".join([str(method), *details])


def refuse_ids_out_of_range(config: Any, said: Statements) -> None:
    """Refuse a padding token that the embedding table has no row for, with which no model can be built.

    Raises
    ------
    UsageError
        With the line to write instead.
    """
    pad, size = config.pad_token_id, config.vocab_size
    if pad is not None and not -size <= pad < size:
        raise UsageError(
            f"{said.quote('pad_token_id', pad)}, and vocab_size {size}, so that transformers can't build the "
            'model; write "pad_token_id": null there'
        )


def refuse_sizes_of_nothing(config: Any, said: Statements, needed: Sequence[str] = ()) -> None:
    """Refuse sizes that no model has; null is left to transformers, but for those ``needed``.

    Raises
    ------
    UsageError
        For the first that is no whole number above 0.
    """
    for key in (*_SIZES, *needed):
        value = getattr(config, key, None)
        if (value is not None or key in needed) and (not isinstance(value, int) or value < 1):
            raise UsageError(f"{said.quote(key, value)}, which must be a whole number above 0")
