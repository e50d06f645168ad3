"""Text, tokenizer and indexed dataset for the quickstart, from what every machine with Python has."""

from __future__ import annotations

import json
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from jobs import run, say

VOCABULARY = 4096
"""Of the studies; the quickstart's models are smaller."""


@dataclass(frozen=True)
class Data:
    """What training reads: the dataset's prefix and the tokenizer's model, in ``folder``."""

    folder: Path

    @property
    def prefix(self) -> str:
        """What Megatron's ``--data-path`` wants."""
        return f"{self.folder}/stdlib_text_document"

    @property
    def flags(self) -> list[str]:
        """Megatron's flags for this data."""
        return [
            *("--data-path", self.prefix, "--data-cache-path", str(self.folder / "cache")),
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", str(self.folder / "tokenizer.model")),
        ]

    def unigram_entropy(self) -> float:
        """Return the entropy of the tokens' frequencies in nats: the loss of knowing nothing but those."""
        import numpy as np

        counts = np.bincount(np.fromfile(f"{self.prefix}.bin", dtype=np.uint16))
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())


def prepare(folder: Path, vocabulary: int = VOCABULARY) -> Data:
    """Make the dataset in ``folder`` unless it is there."""
    data = Data(folder)
    if Path(f"{data.prefix}.idx").exists():
        say(f"Using the data that is there: {data.prefix}.bin, .idx")
        return data
    folder.mkdir(parents=True, exist_ok=True)
    say("Gathering text: the sources of Python's standard library")
    _gather(folder / "stdlib.jsonl")
    say("Training a SentencePiece tokenizer on it")
    _train_tokenizer(folder / "stdlib.jsonl", folder / "tokenizer", vocabulary)
    say("Tokenizing it into Megatron's indexed dataset")
    command = [sys.executable, "tools/preprocess_data.py", "--input", str(folder / "stdlib.jsonl")]
    command += ["--output-prefix", str(folder / "stdlib"), "--append-eod", "--overwrite"]
    command += ["--tokenizer-type", "SentencePieceTokenizer"]
    command += ["--tokenizer-model", str(folder / "tokenizer.model")]
    run((command, folder / "preprocess.log"))
    return data


def _gather(path: Path) -> None:
    """Write the standard library's sources as JSON Lines, one document a file."""
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    sources = sorted(p for p in library.rglob("*.py") if not skipped & set(p.relative_to(library).parts))
    with path.open("w") as output:
        for source in sources:
            output.write(json.dumps({"text": source.read_text(errors="replace")}) + "\n")
    print(f"   {len(sources)} documents, {path.stat().st_size / 1e6:.1f} MB: {path}")


def _train_tokenizer(text: Path, prefix: Path, vocabulary: int) -> None:
    """Train a byte-fallback BPE tokenizer that keeps white space."""
    import sentencepiece

    lines = (
        line for document in text.open() for line in json.loads(document)["text"].splitlines() if line.strip()
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(prefix),
        vocab_size=vocabulary,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        input_sentence_size=60_000,
        minloglevel=2,
    )
    print(f"   {vocabulary} tokens: {prefix}.model")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
