"""``--split-sentences``: with a stand-in for NLTK, and with NLTK itself where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_periln.data.preprocess.sentences import sentence_splitter
from megatron_periln.errors import PreprocessError

PUNKT = "nltk.tokenize.punkt"


class SplitAtPeriods:
    """Stands in for ``PunktTokenizer``."""

    def __init__(self, language: str) -> None:
        if language != "english":
            raise LookupError(f"many\nlines about {language}")

    def tokenize(self, text: str) -> list[str]:
        return [sentence for sentence in text.split(".") if sentence]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nltk", "nltk.tokenize"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    punkt = ModuleType(PUNKT)
    vars(punkt).update(PunktTokenizer=SplitAtPeriods, PunktLanguageVars=object, PunktSentenceTokenizer=object)
    monkeypatch.setitem(sys.modules, PUNKT, punkt)


@pytest.fixture
def flags(tmp_path: Path, write_lines: Callable, tokenizers: dict[str, list[str]]) -> list[object]:
    lines = write_lines(tmp_path / "in.jsonl", [{"text": "One. Two."}, {"text": ""}, {"text": "Three."}])
    return [
        "--input",
        lines,
        "--output-prefix",
        tmp_path / "out",
        "--split-sentences",
        *tokenizers["tiktoken"],
    ]


def test_each_sentence_is_a_sequence(
    stand_in: None, tmp_path: Path, run: Callable, flags: list[object], megatron_tokenizer: Callable
) -> None:
    code, stderr = run(*flags, "--append-eod")
    assert code == 0, stderr
    assert not list(tmp_path.glob("out_text_document*"))
    tokenizer = megatron_tokenizer("tiktoken")
    dataset = IndexedDataset(str(tmp_path / "out_text_sentence"))
    expected = [
        tokenizer.tokenize("One"),
        [*tokenizer.tokenize(" Two"), tokenizer.eod],
        [*tokenizer.tokenize("Three"), tokenizer.eod],
    ]
    assert [dataset[n].tolist() for n in range(len(dataset))] == expected
    assert dataset.document_indices.tolist() == [0, 2, 2, 3]


def test_a_list_cannot_be_split(
    stand_in: None, tmp_path: Path, refused: Callable[..., str], flags: list[object], write_lines: Callable
) -> None:
    lines = write_lines(tmp_path / "in.jsonl", [{"text": "One."}, {"text": ["Two."]}])
    assert (
        f"{lines}:2: byte 17: key 'text' has a list; with --split-sentences it must be a string"
        in refused(*flags)
    )


def test_a_sentence_ends_with_its_block(stand_in: None) -> None:
    split = sentence_splitter()
    assert [len(sentence) for sentence in split("a" * 2_500_000)] == [1_000_000, 1_000_000, 500_000]
    assert split("") == []


def test_nltk_is_missing(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str], flags: list[object]
) -> None:
    monkeypatch.setitem(sys.modules, PUNKT, None)
    assert 'pip install "megatron-periln[sentences]"' in refused(*flags)


def test_model_is_missing(stand_in: None, refused: Callable[..., str], flags: list[object]) -> None:
    message = refused(*flags, "--lang", "klingon")
    assert "no Punkt model for --lang klingon: python -m nltk.downloader punkt_tab" in message


@pytest.fixture
def punkt_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Punkt model that knows one abbreviation."""
    nltk = pytest.importorskip("nltk")
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    contents = {
        "abbrev_types.txt": "dr\n",
        "collocations.tab": "",
        "sent_starters.txt": "",
        "ortho_context.tab": "",
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])


def test_nltk(punkt_model: None) -> None:
    text = "Dr. Who came.\n\nHe left. "
    assert sentence_splitter()(text) == ["Dr. Who came.", "He left."]
    assert sentence_splitter(keep_newlines=True)(text) == ["Dr. Who came.\n\n", "He left."]


def test_nltk_model_is_missing(punkt_model: None) -> None:
    with pytest.raises(PreprocessError, match="no Punkt model for --lang klingon"):
        sentence_splitter("klingon")
