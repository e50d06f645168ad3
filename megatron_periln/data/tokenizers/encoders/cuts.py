r"""Where a text may be cut without another token id: between words, as every rule of its tokenizer has them.

Libraries need up to 170 bytes of memory for each byte of one text. A tokenizer splits a text into words and
encodes each by itself, so that a text cut between two words gives the ids of its parts, if the parts are
split as the whole is. Why that holds at the places found here:

1. Words are matches of a pattern, tried from left to right. Of the alternatives in ``_ALTERNATIVES`` none
   looks back, and the only one that looks ahead, ``\s+(?!\S)``, looks one character beyond white space.
2. No match of any of them has (a) a letter or digit followed by white space, (b) anything but white space
   followed by a space, or (c) a line end followed by a letter. So each match ends at such a place, and what
   can match before or behind it is the same where the text ends or begins there. With (c) the text must have
   something else than white space before the line end: then ``\s+(?!\S)`` sees that line end alone, and the
   match is the same one character whichever alternative finds it.
3. ``\s+`` being one of the alternatives, white space always is in a match, and a match begins or ends there.
   A step before or behind it that splits further, at digits say, has matches of none of these kinds either.
4. Added tokens are found before that, in the whole text. None has white space in it, so none is cut; and none
   ends before the place or begins behind it, and could take white space along.
5. The normalizations in ``_NORMALIZERS`` change characters, and marks with what they stand on: nothing across
   a space or a line end that follows, or a letter behind a line end.

Of tokenizers that make one word of the whole text, those are cut before a space whose merges never join
something and a space behind it: the pairs on both sides are merged independently. The space itself is what
they put before every text, so it is left out. What is not known to be like this is not cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer

__all__ = ["Cuts", "find_cuts", "known_pattern"]

_ALTERNATIVES = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
    *("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)"),
    *(r" ?\p{L}+", r" ?\p{N}+", r"\p{L}+", r"\p{N}", r"\p{N}+", r"\p{N}{1,2}", r"\p{N}{1,3}"),
    *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+"),
    *(
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]{upper}"
        rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]{lower}{contraction}"
        for upper, lower in ("*+", "+*")
        for contraction in ("", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?")
    ),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
    r" ?[^\s\p{L}\p{N}]++[\r\n]*",
    *(r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+", r" ?[\p{P}\p{S}]+[\r\n]*", "[一-龥぀-ゟ\u30a0-ヿ]+"),
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+".replace('\\"', '"'),
    *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+"),
}
_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer")
_SPLITS_FURTHER = ("Digits", "Punctuation")
_SPLITS_AT_WHITE_SPACE = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")
_SPACE = "▁"
_ANY = r"\s\S"

# Letters and digits, and others that are no white space, by every version of Unicode; those of the first line
# are changed by no normalization either.
_ASCII_LETTERS, _DIGITS, _IDEOGRAPHS = "A-Za-z", "0-9", "\u4e00-\u9fa5"
_LETTERS = "\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u00ff\u0391-\u03a1\u03a3-\u03a9\u0410-\u044f\u05d0-\u05ea"
_LETTERS += "\u0621-\u063a\u0641-\u064a\u3041-\u3093\u30a1-\u30f6\uac00-\ud7a3"
_OTHERS = "!-/:-@\\[-`{-~"
_MORE_OTHERS = "\u3001\u3002\uff01\uff0c\uff1f"


@dataclass(frozen=True)
class Cuts:
    """The places where a text may be cut.

    Parameters
    ----------
    places
        Matches there; what it matches is left out.
    """

    places: re.Pattern[str]

    def pieces(self, text: str, size: int) -> list[str]:
        """Return a text cut in pieces of at least ``size`` characters, and as few more as its words allow."""
        found, start = [], 0
        while place := self.places.search(text, start + max(size, 1)):
            found.append(text[start : place.start()])
            start = place.end()
        return [*found, text[start:]]


def find_cuts(resolved: ResolvedTokenizer) -> Cuts | None:
    """Return where texts may be cut for a tokenizer, None where that is not known."""
    if resolved.kind == "tiktoken":
        added = [{"content": token, "normalized": False} for token in resolved.settings["special_tokens"]]
        known = known_pattern(resolved.settings["pattern"])
        return Cuts(_between_words(_Edges.of(added, plain=True))) if known and _cut_none(added) else None
    if resolved.kind == "tokenizers" and resolved.settings["template"] is not None:
        return _of_hugging_face(json.loads(resolved.payload))
    if resolved.kind == "sentencepiece" and resolved.accelerated:
        content = json.loads(resolved.accelerated)
        return None if "reason" in content else _of_hugging_face(content)
    return None


def known_pattern(pattern: str) -> bool:
    """Whether the proof above holds for every alternative of a pattern, and white space matches."""
    alternatives = _alternatives(pattern)
    return r"\s+" in alternatives and _ALTERNATIVES.issuperset(alternatives)


@dataclass(frozen=True)
class _Edges:
    """Characters that may stand beside a cut, as classes of a pattern.

    Parameters
    ----------
    letters
        Letters and digits.
    others
        What else is no white space.
    first
        Letters that begin no added token.
    not_last, not_first
        Characters that end, or begin, an added token, which must not stand before a cut, or behind it.
    """

    letters: str
    others: str
    first: str
    not_last: str
    not_first: str

    @classmethod
    def of(cls, added: Iterable[dict[str, Any]], *, plain: bool) -> _Edges:
        """Return those beside which no added token stands; few kinds, unless texts are taken as they are."""
        contents = [form for token in added for form in _forms(token["content"])]
        first = _ASCII_LETTERS + _IDEOGRAPHS + (_LETTERS if plain else "")
        others = _OTHERS + (_MORE_OTHERS if plain else "")
        not_last = "".join(sorted({re.escape(content[-1]) for content in contents} | {_SPACE}))
        not_first = "".join(sorted({re.escape(content[0]) for content in contents}))
        return cls(first + _DIGITS, others, first, not_last, not_first)

    def before(self, characters: str) -> str:
        """Return a pattern that looks for one of these before a cut."""
        return f"(?<=[{characters}])(?<![{self.not_last}])"

    def behind(self, characters: str) -> str:
        r"""Return a pattern that looks for one of these behind a cut; for any with ``\s\S``."""
        return (f"(?![{self.not_first}])" if self.not_first else "") + f"(?=[{characters}])"


def _forms(content: str) -> set[str]:
    return {content, content.lower(), content.upper()} if content else set()


def _between_words(edges: _Edges) -> re.Pattern[str]:
    after_line = f"(?<=[{edges.letters}{edges.others}]\n){edges.behind(edges.first)}"
    before_space = f"{edges.before(edges.letters + edges.others)}(?= )"
    before_line = f"{edges.before(edges.letters)}(?=\n)"
    return re.compile(f"{before_space}|{before_line}|{after_line}")


def _of_hugging_face(content: dict[str, Any]) -> Cuts | None:
    added, normalizer, words = content["added_tokens"], content["normalizer"], content["pre_tokenizer"]
    if not _cut_none(added):
        return None
    steps = _steps(normalizer, "normalizers")
    edges = _Edges.of(added, plain=not steps)
    if words is None:
        return _of_one_word(content["model"], steps, edges)
    if not all(step["type"] in _NORMALIZERS for step in steps):
        return None
    if words["type"] == "Metaspace":
        if words["replacement"] != _SPACE or not words.get("split", True):
            return None
        return Cuts(re.compile(f"{edges.before(edges.letters + edges.others)}(?= )"))
    kinds = [_splits_at_spaces(step) for step in _steps(words, "pretokenizers")]
    return Cuts(_between_words(edges)) if True in kinds and None not in kinds else None


def _of_one_word(model: dict[str, Any], steps: list[dict[str, Any]], edges: _Edges) -> Cuts | None:
    """Return where texts may be cut that are one word: between what no merge joins and a space."""
    prepended = {"type": "Prepend", "prepend": _SPACE}
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if steps != [prepended, replaced] or model["type"] != "BPE" or model.get("ignore_merges"):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    inside = re.compile(f"[^{_SPACE}]{_SPACE}")
    if _SPACE not in model["vocab"] or any(inside.search(token) for token in model["vocab"]):
        return None
    return Cuts(re.compile(f"{edges.before(edges.letters + edges.others)} {edges.behind(_ANY)}"))


def _cut_none(added: Iterable[dict[str, Any]]) -> bool:
    """Whether no added token has white space, also as a normalizer may write it, and none is empty."""
    return not any(
        not token["content"]
        or re.search(r"\s", token["content"])
        or (token["normalized"] and _SPACE in token["content"])
        for token in added
    )


def _steps(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [inner for part in step[name] for inner in _steps(part, name)] if name in step else [step]


def _splits_at_spaces(step: dict[str, Any]) -> bool | None:
    """Whether a step always splits where the proof says, False if it only may, None if nobody knows."""
    kind = step["type"]
    if kind == "ByteLevel":
        return bool(step["use_regex"]) if not step["add_prefix_space"] else None
    if kind == "Split" and (pattern := step["pattern"].get("Regex")):
        if (
            step["behavior"] == "Isolated"
            and not step["invert"]
            and _ALTERNATIVES.issuperset(_alternatives(pattern))
        ):
            return known_pattern(pattern)
        matches_alone = step["behavior"] == "Removed" and step["invert"] and known_pattern(pattern)
        return True if matches_alone else None
    if kind in _SPLITS_AT_WHITE_SPACE:
        return True
    return False if kind in _SPLITS_FURTHER and step.get("behavior", "Isolated") == "Isolated" else None


def _alternatives(pattern: str) -> list[str]:
    """Return the alternatives of a pattern, cut at the bars outside of brackets."""
    found, depth, at, in_class = [""], 0, 0, False
    while at < len(pattern):
        length = 2 if pattern[at] == "\\" else 1
        character = pattern[at : at + length]
        if in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        else:
            depth += (character == "(") - (character == ")")
        if character == "|" and not depth and not in_class:
            found.append("")
        else:
            found[-1] += character
        at += length
    return found
