"""Tokenizers of all kinds, by name."""

from tests.data.tokenizers.encoder_tokenizers import flags_fixture, resolved_fixture

__all__ = ["flags_fixture", "resolved_fixture"]
