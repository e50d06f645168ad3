"""What Megatron's tokenizers are made of: the library that does their work, and its model and settings."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

from megatron_periln.data.tokenizers.encoders.gigatoken import template_ids, unsupported_reason
from megatron_periln.data.tokenizers.megatron_tokenizer import Tokenizer

__all__ = ["Parts", "sentencepiece_parts", "take_apart"]

_LIBRARIES = "megatron.core.tokenizers.text.libraries."
_SAMPLE = 4000


@dataclass(frozen=True)
class Parts:
    """The parts of a tokenizer.

    Parameters
    ----------
    kind, payload, settings
        As in ``ResolvedTokenizer``.
    special_tokens
        The strings that it treats in a special way.
    strings
        The strings of its vocabulary by id; empty where they are not known.
    """

    kind: str
    payload: bytes = b""
    settings: dict[str, Any] = field(default_factory=dict)
    special_tokens: list[str] = field(default_factory=list)
    strings: list[str] = field(default_factory=list)

    @property
    def vocabulary(self) -> list[str]:
        """Some of the strings."""
        return self.strings[:: max(1, len(self.strings) // _SAMPLE)]


def take_apart(tokenizer: Tokenizer) -> Parts:
    """Return what one of Megatron's tokenizers is made of; kind ``megatron`` where that is not known."""
    if type(tokenizer).__module__.startswith("megatron.core.tokenizers."):
        inner = tokenizer._tokenizer  # type: ignore[attr-defined]
        take = {
            "huggingface_tokenizer.HuggingFaceTokenizer": _hugging_face,
            "megatron_hf_tokenizer.MegatronHFTokenizer": _hugging_face,
            "sentencepiece_tokenizer.SentencePieceTokenizer": _sentencepiece,
            "tiktoken_tokenizer.TikTokenTokenizer": _tiktoken,
        }.get(f"{type(inner).__module__}.{type(inner).__qualname__}".removeprefix(_LIBRARIES))
        if take and (taken := take(inner)):
            return taken
    return Parts("megatron")


def _hugging_face(inner: Any) -> Parts | None:
    try:
        # Takes most of a second, and only where Megatron has built a tokenizer of transformers anyway.
        from transformers.tokenization_utils_base import PreTrainedTokenizerBase
        from transformers.tokenization_utils_tokenizers import TokenizersBackend
    except ImportError:  # none, or another than transformers 5
        return None
    outer = inner.tokenizer
    own = type(outer).__module__.startswith("transformers.") and all(
        getattr(type(outer), name, None) is getattr(base, name)
        for base, name in (
            (TokenizersBackend, "_encode_plus"),
            (TokenizersBackend, "_convert_encoding"),
            (TokenizersBackend, "tokenize"),
            (PreTrainedTokenizerBase, "__call__"),
        )
    )
    if not isinstance(outer, TokenizersBackend) or not own:
        return None
    backend = outer.backend_tokenizer
    vocabulary = sorted(backend.get_vocab().values())
    if not inner.include_special_tokens and any(
        backend.token_to_id(backend.id_to_token(token)) != token for token in vocabulary
    ):
        # Megatron takes the detour over the tokens' names.
        return None
    # As a call does.
    backend.no_truncation()
    backend.no_padding()
    content = backend.to_str()
    described = json.loads(content)
    if described["model"].get("dropout"):
        return None
    template = template_ids(described["post_processor"])
    settings = {
        "unsupported": unsupported_reason(described),
        "template": template and list(template),
        "add_special_tokens": bool(inner.include_special_tokens),
        "encode_special_tokens": bool(outer.split_special_tokens),
    }
    special = [token.content for _, token in sorted(backend.get_added_tokens_decoder().items())]
    strings = [backend.decode([token], skip_special_tokens=False) for token in vocabulary]
    return Parts("tokenizers", content.encode(), settings, special, strings)


def _sentencepiece(inner: Any) -> Parts | None:
    if inner.legacy or (inner.removed_extra_spaces and not inner.ignore_extra_whitespaces):
        # Megatron handles special tokens or white space itself.
        return None
    return sentencepiece_parts(inner.tokenizer)


def sentencepiece_parts(model: Any) -> Parts:
    """Return the parts of a ``SentencePieceProcessor``."""
    pieces = [(token, model.id_to_piece(token).replace("▁", " ")) for token in range(model.get_piece_size())]
    special = [piece for token, piece in pieces if model.is_control(token) or model.is_unknown(token)]
    return Parts(
        "sentencepiece",
        model.serialized_model_proto(),
        {},
        special,
        [piece for _, piece in pieces],
    )


def _tiktoken(inner: Any) -> Parts | None:
    first = len(inner.special_tokens)
    ranks = sorted(inner.token2id.items(), key=lambda item: item[1])
    if [rank for _, rank in ranks] != list(range(first, first + len(ranks))):
        return None
    lines = [f"{base64.b64encode(token).decode()} {rank}\n".encode() for rank, (token, _) in enumerate(ranks)]
    settings = {"pattern": inner.tokenizer._pat_str, "special_tokens": list(inner.special_tokens)}
    strings = [token.decode(errors="ignore") for token, _ in ranks]
    return Parts("tiktoken", b"".join(lines), settings, settings["special_tokens"], strings)
