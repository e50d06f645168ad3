"""Encoders of batches of texts, each giving the token ids of Megatron's tokenizer."""

from megatron_periln.data.tokenizers.encoders.base import (
    BatchEncoder,
    Encoded,
    EncoderUnavailableError,
    token_dtype,
)
from megatron_periln.data.tokenizers.encoders.characters import GuardedEncoder
from megatron_periln.data.tokenizers.encoders.pieces import PiecewiseEncoder, TextTooLargeError
from megatron_periln.data.tokenizers.encoders.selection import (
    ChosenEncoder,
    available_encoders,
    choose_encoder,
    difference_between,
    first_difference,
    likely_reference,
    open_encoder,
)

__all__ = [
    "BatchEncoder",
    "ChosenEncoder",
    "Encoded",
    "EncoderUnavailableError",
    "GuardedEncoder",
    "PiecewiseEncoder",
    "TextTooLargeError",
    "available_encoders",
    "choose_encoder",
    "difference_between",
    "first_difference",
    "likely_reference",
    "open_encoder",
    "token_dtype",
]
