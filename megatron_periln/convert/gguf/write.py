"""Writing the GGUF file of an exported model, and proving that llama.cpp gives its token ids and logits."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from megatron_periln.convert.gguf.graphs import check_graph, window_of
from megatron_periln.convert.gguf.pre_tokenizers import PRE_TOKENIZERS, rank
from megatron_periln.convert.gguf.processes import LlamaCpp, Vocabulary
from megatron_periln.convert.logits import transformers_model
from megatron_periln.convert.tokens.auto_tokenizer import UnreadableError, load
from megatron_periln.convert.tokens.sentencepiece_model import Kind, SentencePieceModel
from megatron_periln.convert.tokens.texts import FEATURES
from megatron_periln.data.tokenizers.probes import probe_texts
from megatron_periln.errors import UsageError
from megatron_periln.files import replacing

__all__ = ["GGUFOptions", "write_gguf"]

_MIXTURES = 2000
_SPLIT = 600
"""On how many of them the patterns of all pre-tokenizers are tried."""
_TRIED = 4
"""Of the pre-tokenizers that split nearest, how many are tried in llama.cpp."""
_TOKENS = 64
"""At how many positions the logits are compared, the last of a sample's."""
_LONGEST = 512
"""Of the samples, which are longer than a layer's window if that is shorter."""
_TOLERANCE = 1e-4
"""Of fp32 logits, as for the export itself."""
_LONG_S = "'\u017f"
"""An ending to the patterns of tokenizers, which ignore case (``(?i:'s)``), and none to llama.cpp."""
_INSTEAD = (
    "give llama.cpp the ids of the folder's own tokenizer instead of texts; --pre-tokenizer NAME writes it so"
)


@dataclass(frozen=True, kw_only=True)
class GGUFOptions:
    """How to write.

    Parameters
    ----------
    llama_cpp
        llama.cpp's converter, and llama.cpp.
    kind
        The converter's ``--outtype``.
    pre_tokenizer
        The name to take, whatever the ids; None for the one that is right.
    """

    llama_cpp: LlamaCpp
    kind: str = "auto"
    pre_tokenizer: str | None = None


@dataclass(frozen=True)
class _Tokens:
    """The ids that llama.cpp should give."""

    vocabulary: Vocabulary
    texts: list[str]
    own: int
    ids: list[list[int]]
    tokenizer: Tokenizer
    plain: list[str]

    def differences(self, found: dict[str, Any], *, apart: bool = False) -> list[int]:
        """Return which texts get other ids; with ``apart``, of those that are not counted."""
        pairs = enumerate(zip(found["ids"], self.ids, strict=True))
        return [at for at, (ids, right) in pairs if ids != right and _is_apart(self.texts[at]) is apart]

    def told(self, found: dict[str, Any]) -> str:
        """Return how many texts get the ids, and the first that doesn't."""
        wrong = self.differences(found)
        same = "ids equal on" if not wrong else f"other ids for {len(wrong):,} of"
        own = f"{len(self.texts) - self.own:,} texts, {self.own:,} tokens' own text"
        first = f"; {self._shown(found, wrong[0])}" if wrong else ""
        if apart := self.differences(found, apart=True):
            first += (
                f"; not counted: {len(apart)} with characters newer than Unicode "
                f"{unicodedata.unidata_version}, or {_LONG_S}, which is no ending such as 's to llama.cpp"
            )
        return f"in llama.cpp ({found['runtime']}) {same} {own}{first}"

    def _shown(self, found: dict[str, Any], at: int) -> str:
        text, ids, right = self.texts[at], found["ids"][at], self.ids[at]
        shared = min(len(ids), len(right))
        where = next((n for n in range(shared) if ids[n] != right[n]), shared)
        window = slice(max(0, where - 1), where + 4)
        text = repr(text) if len(text) <= 60 else f"{text[:45]!r}..."
        return f"for {text} at token {where} it gives {ids[window]}, the tokenizer {right[window]}"


def _is_apart(text: str) -> bool:
    """Return whether llama.cpp is known to split a text otherwise, with every published tokenizer too."""
    return _LONG_S in text or any(unicodedata.category(character) == "Cn" for character in text)


def write_gguf(model: Path, output: Path, options: GGUFOptions, say: Callable[[str], None] = print) -> None:
    """Write a GGUF file, which appears when its ids and logits have been compared.

    Parameters
    ----------
    model
        The folder of an export, or of a model of transformers.
    output
        The file.
    options
        How.
    say
        Receives one line for each thing worth knowing.

    Raises
    ------
    UsageError
        If llama.cpp can't compute the model or give its ids; ``output`` is then as it was.
    """
    config = check_graph(model)
    tokens = _tokens(model)
    sample = torch.arange(_sample_length(config)) * 7919 % config.vocab_size
    nearest: tuple[str, dict[str, Any]] | None = None
    with replacing(output) as (file,):
        for name in [options.pre_tokenizer] if options.pre_tokenizer else _names(tokens):
            options.llama_cpp.convert({model: file}, tokens.vocabulary, name, options.kind)
            found = options.llama_cpp.run(
                file, tokens.texts, tokens.vocabulary.special, sample.tolist(), _TOKENS
            )
            if not (wrong := tokens.differences(found)) or options.pre_tokenizer:
                break
            if nearest is None or len(wrong) < len(tokens.differences(nearest[1])):
                nearest = name, found
        else:
            raise _none_fits(tokens, *nearest) if nearest else AssertionError("no name was tried")
        say(f"Tokenizer: {_kind(tokens, name)}; {tokens.told(found)}")
        _compare_logits(model, sample, found["logits"], options.kind, say)
    say(f"Wrote {output}")


def _sample_length(config: Any) -> int:
    """Return how many tokens show whether a window is kept."""
    wanted = _TOKENS if (window := window_of(config)) is None else max(_TOKENS, window + _TOKENS // 2)
    return min(wanted, _LONGEST, config.max_position_embeddings)


def _tokens(model: Path) -> _Tokens:
    if not (model / "tokenizer.json").is_file():
        raise UsageError(
            f"{model} holds no tokenizer.json, and a GGUF file has its tokenizer in it; "
            "export with --tokenizer PATH"
        )
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    content = json.loads(tokenizer.to_str())
    special = [token["content"] for token in content["added_tokens"]]
    vocabulary = tokenizer.get_vocab()
    own = [tokenizer.decode([number], skip_special_tokens=False) for number in sorted(vocabulary.values())]
    features = [text for texts in FEATURES.values() for text in texts]
    texts = [*features, *probe_texts(special, list(vocabulary), _MIXTURES)]
    try:
        (loaded,) = load([model], [*texts, *own])
    except UnreadableError as error:
        raise UsageError(f"AutoTokenizer can't read {model}: {error}") from error
    config = json.loads((model / "config.json").read_text())
    empty = loaded.ids[len(features) - 1]
    adds = (empty[:1] == [config.get("bos_token_id")], empty[-1:] == [loaded.eos] and len(empty) > 0)
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    pieces = _pieces(model / "tokenizer.model")
    if pieces is None and content["model"]["type"] != "BPE":
        raise UsageError(
            f"{model / 'tokenizer.json'} is a {content['model']['type']}, for which llama.cpp has only "
            f"SentencePiece's own file, tokenizer.model; {_INSTEAD}"
        )
    plain = [text for text in texts if not (_is_apart(text) or any(token in text for token in special))]
    return _Tokens(
        _vocabulary(pieces, adds, not settings.get("split_special_tokens", False)),
        [*texts, *own],
        len(own),
        loaded.ids,
        tokenizer,
        plain[:_SPLIT],
    )


def _pieces(path: Path) -> SentencePieceModel | None:
    """Read a SentencePiece model; files of that name may also hold a vocabulary of tiktoken."""
    try:
        return SentencePieceModel.read(path.read_bytes()) if path.is_file() else None
    except ValueError:
        return None


def _vocabulary(pieces: SentencePieceModel | None, adds: tuple[bool, bool], special: bool) -> Vocabulary:
    if pieces is None:
        return Vocabulary("bpe", adds, special)
    defined = (
        number
        for number, piece in enumerate(pieces.pieces)
        if piece.kind is Kind.USER_DEFINED and len(piece.text) > 1
    )
    return Vocabulary("sentencepiece", adds, special, pieces.dummy_prefix, tuple(defined))


def _names(tokens: _Tokens) -> list[str]:
    """Return the names of the pre-tokenizers to try."""
    if tokens.vocabulary.kind == "sentencepiece":
        return ["default"]
    ranked = rank(tokens.tokenizer, tokens.plain)
    fitting = [each.name for each, count in ranked if count == 0] or [each.name for each, _ in ranked]
    return fitting[:_TRIED]


def _kind(tokens: _Tokens, name: str) -> str:
    return "SentencePiece" if tokens.vocabulary.kind == "sentencepiece" else f"pre-tokenizer {name}"


def _none_fits(tokens: _Tokens, name: str, found: dict[str, Any]) -> UsageError:
    which = f"none of llama.cpp's {len(PRE_TOKENIZERS)} pre-tokenizers gives"
    if tokens.vocabulary.kind == "sentencepiece":
        which = "llama.cpp's reading of SentencePiece models doesn't give"
    return UsageError(
        f"{which} the tokenizer's ids; the nearest, {_kind(tokens, name)}: {tokens.told(found)}; {_INSTEAD}"
    )


def _compare_logits(
    model: Path, sample: torch.Tensor, found: list[list[float]], kind: str, say: Callable[[str], None]
) -> None:
    with transformers_model(model) as reference:
        expected = reference.logits(sample[None])[0, -_TOKENS:].numpy()
    largest = float(np.abs(np.array(found) - expected).max())
    if not math.isfinite(largest):
        raise UsageError(
            f"llama.cpp's logits ({kind}) or transformers' (fp32) are not all finite numbers: the largest "
            f"difference is {largest}; look for NaN and infinite weights, and try another --outtype"
        )
    if largest > _TOLERANCE and kind == "f32":
        raise UsageError(
            f"llama.cpp's logits differ from transformers' by up to {largest:.1e}, where {_TOLERANCE:.0e} is "
            "allowed; please report this with the model's config.json"
        )
    say(
        f"Logits: largest difference between llama.cpp ({kind}) and transformers (fp32): {largest:.1e} on "
        f"{len(expected)} tokens, their standard deviation {expected.std():.2f}"
    )
