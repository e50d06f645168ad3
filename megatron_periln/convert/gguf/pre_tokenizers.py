"""llama.cpp's pre-tokenizers by name, and which of them splits texts as a ``tokenizer.json`` does.

A GGUF file names the pre-tokenizer of a byte-level BPE; llama.cpp refuses a name that it doesn't know.

Source: ``llm_tokenizer_bpe`` and ``llama_vocab::impl::load`` in llama.cpp's src/llama-vocab.cpp (that of
llama-cpp-python 0.3.36). Names that split alike and look up whole words alike stand here once. Those whose
split is no regular expression (kimi-k2, afmoe), or that are not for byte-level BPE (gemma4, sarvam-moe,
whitespace), are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tokenizers import Regex, Tokenizer, pre_tokenizers

__all__ = ["PRE_TOKENIZERS", "PreTokenizer", "rank"]

_ENDINGS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA_3 = rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN_2 = rf"{_ENDINGS}|{_WORD}|\p{{N}}|{_REST}"
_CASCADE = "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_NO_STOPS = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"


def _by_case(letter: str, ending: str, digits: str) -> str:
    """Return GPT-4o's split, in which words begin where capitals follow small letters."""
    upper, lower = rf"((?={letter})([^a-z]))", rf"((?={letter})([^A-Z]))"
    words = rf"{_BEFORE}{upper}*{lower}+{ending}|{_BEFORE}{upper}+{lower}*{ending}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"


@dataclass(frozen=True)
class PreTokenizer:
    """What a name stands for.

    Parameters
    ----------
    name
        In a GGUF file, ``tokenizer.ggml.pre``.
    patterns
        Each splits what those before it have left, at its matches and between them.
    whole_words
        What is split is looked up in the vocabulary before it is merged (``ignore_merges``).
    """

    name: str
    patterns: tuple[str, ...]
    whole_words: bool = False

    def split(self, text: str) -> list[str]:
        """Return the parts of a text, none of them empty."""
        return [text[start:end] for _, (start, end) in self._splits.pre_tokenize_str(text)]

    @cached_property
    def _splits(self) -> pre_tokenizers.Sequence:
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        )


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (_GPT_2,)),
    PreTokenizer("starcoder", (r"\p{N}", _GPT_2)),
    PreTokenizer("dbrx", (_LLAMA_3,)),
    PreTokenizer("llama-bpe", (_LLAMA_3,), whole_words=True),
    PreTokenizer("qwen2", (_QWEN_2,)),
    PreTokenizer(
        "qwen35",
        (
            rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        ),
    ),
    PreTokenizer("minicpm5", (r"\p{N}{1,3}", rf"{_ENDINGS}|{_WORD}|\p{{N}}+|{_REST}"), whole_words=True),
    PreTokenizer(
        "jais-2",
        (rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_CASCADE}|\s{{1}}",),
    ),
    PreTokenizer("ufakzeka", (rf"{_WORD}|\p{{N}}|{_REST}",)),
    PreTokenizer("seed-coder", (rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
    PreTokenizer(
        "bailingmoe",
        (
            rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
    ),
    PreTokenizer(
        "exaone-moe",
        (
            rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
    ),
    PreTokenizer("laguna", (r"[^\n]+|[\n]+", _QWEN_2)),
    PreTokenizer("gpt-4o", (_by_case(r"[\p{L}]", f"{_ENDINGS}?", r"\p{N}{1,3}"),)),
    PreTokenizer("tekken", (_by_case(r"[\p{L}]", "", r"\p{N}"),), whole_words=True),
    PreTokenizer(
        "granite-embed-multi-97m",
        (_by_case(r"[\p{L}\p{M}]", f"{_ENDINGS}?", r"\p{N}{1,3}"),),
        whole_words=True,
    ),
    PreTokenizer(
        "deepseek-v3",
        (r"\p{N}{1,3}", _HAN_KANA, rf"{_MARKS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"),
    ),
    PreTokenizer(
        "spark2_5",
        (
            r"\p{N}{1,3}",
            _HAN_KANA,
            rf"{_MARKS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+",
            r"\p{N}",
        ),
    ),
    PreTokenizer("deepseek-coder", ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")),
    PreTokenizer("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", _GPT_2, "[0-9][0-9][0-9]")),
    PreTokenizer("default", (r"[\p{P}\$\+<=>\^~\|]+", _GPT_2, r"\p{N}+", "[0-9][0-9][0-9]")),
    PreTokenizer("bloom", (_NO_STOPS,)),
    PreTokenizer("viking", (_NO_STOPS, r"\p{N}")),
    PreTokenizer("superbpe", (r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
)
"""The plainest names first: of several that give the same ids, the first is taken."""


def rank(tokenizer: Tokenizer, texts: list[str]) -> list[tuple[PreTokenizer, int]]:
    """Return llama.cpp's pre-tokenizers, and how many texts each splits otherwise; the nearest first.

    Parameters
    ----------
    tokenizer
        A byte-level BPE. Its added tokens are not in question: texts should have none.
    texts
        The texts.
    """
    expected = [_parts(tokenizer, text) for text in texts]
    whole = bool(getattr(tokenizer.model, "ignore_merges", False))
    counted = [
        (each, sum(each.split(text) != right for text, right in zip(texts, expected, strict=True)))
        for each in PRE_TOKENIZERS
    ]
    return sorted(counted, key=lambda pair: (pair[1], pair[0].whole_words != whole))


def _parts(tokenizer: Tokenizer, text: str) -> list[str]:
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text] if text else []
    parts = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in parts]
