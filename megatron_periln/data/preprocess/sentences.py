"""Sentence splitting with NLTK's Punkt models, as Megatron-LM splits (tools/preprocess_data.py)."""

from __future__ import annotations

from collections.abc import Callable

from megatron_periln.errors import PreprocessError

__all__ = ["sentence_splitter"]

_BLOCK_CHARACTERS = 1_000_000


def sentence_splitter(
    language: str = "english", *, keep_newlines: bool = False
) -> Callable[[str], list[str]]:
    """Return the function that splits a text into sentences.

    A text is split in blocks of a million characters, so a sentence also ends where a block does.

    Parameters
    ----------
    language
        Name of the Punkt model, for example ``english``.
    keep_newlines
        Leave the white space between two sentences at the end of the first instead of dropping it.

    Raises
    ------
    PreprocessError
        If NLTK or the Punkt model of the language is not installed.
    """
    try:
        # Not at the top: nltk is optional, and its import takes a second.
        from nltk.tokenize.punkt import PunktLanguageVars, PunktSentenceTokenizer, PunktTokenizer
    except ImportError as error:
        raise PreprocessError(
            '--split-sentences needs nltk 3.9 or later: pip install "megatron-periln[sentences]"'
        ) from error
    try:
        punkt = PunktTokenizer(language)
    except (LookupError, ValueError, OSError) as error:
        raise PreprocessError(
            f"--split-sentences: no Punkt model for --lang {language}: python -m nltk.downloader punkt_tab, "
            f"and set NLTK_DATA if it is not in a default folder"
        ) from error

    if keep_newlines:
        # As Megatron-LM's CustomLanguageVars: NLTK's pattern of the end of a sentence, where \s* stands
        # outside the look-ahead, so that the white space belongs to the sentence before.
        class WhiteSpaceEndsSentence(PunktLanguageVars):
            _period_context_fmt = r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"

        # NLTK has no public way to what a model has learned.
        punkt = PunktSentenceTokenizer(punkt._params, lang_vars=WhiteSpaceEndsSentence())

    def split(text: str) -> list[str]:
        return [
            sentence
            for start in range(0, len(text), _BLOCK_CHARACTERS)
            for sentence in punkt.tokenize(text[start : start + _BLOCK_CHARACTERS])
        ]

    return split
