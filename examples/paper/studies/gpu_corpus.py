"""Make the corpus of 125m_gpu.yaml: 25 MiB of tokens from the Python sources that are installed here.

    python examples/paper/studies/gpu_corpus.py runs/studies/gpu_corpus

The folder holds all that training reads, and can be copied to a machine without a network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

TOKENS = 25 * 2**20 // 2  # of 16 bits each


def sources(folders: list[Path]) -> Iterator[str]:
    """Yield each different source file, in an order that has nothing to do with where it is."""
    files = {path for folder in folders for path in folder.rglob("*.py")}
    texts = {path.read_text(errors="replace") for path in files if path.stat().st_size < 200_000}
    by_hash = {hashlib.sha256(text.encode()).hexdigest(): text for text in texts if len(text) > 200}
    yield from (by_hash[digest] for digest in sorted(by_hash))


def train_tokenizer(texts: Path, prefix: Path, vocabulary: int) -> None:
    """Train a byte-fallback BPE tokenizer that keeps white space, as the quickstart's."""
    import sentencepiece  # not needed where the tokenizer is there already

    lines = (line for text in texts.open() for line in json.loads(text)["text"].splitlines() if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(prefix),
        vocab_size=vocabulary,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        input_sentence_size=200_000,
        shuffle_input_sentence=False,
        minloglevel=2,
    )


def main() -> None:
    """Gather the text, train the tokenizer, write the indexed dataset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="about how many; default: 25 MiB of them")
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--from", dest="folders", type=Path, nargs="+", help="default: this Python's library")
    options = parser.parse_args()
    paths = sysconfig.get_paths()
    folders = options.folders or [Path(paths["stdlib"]), Path(paths["purelib"])]
    options.output.mkdir(parents=True, exist_ok=True)
    text, tokenizer = options.output / "python.jsonl", options.output / "tokenizer"
    left = options.tokens * 3.3  # characters of source that such a token has
    with text.open("w") as file:
        for source in sources(folders):
            file.write(json.dumps({"text": source}) + "\n")
            left -= len(source)
            if left < 0:
                break
    if left > 0:
        parser.error(f"{', '.join(map(str, folders))}: too few sources for {options.tokens:,} tokens")
    train_tokenizer(text, tokenizer, options.vocabulary)
    subprocess.run(
        [
            *(sys.executable, "-m", "megatron_periln.tools.preprocess_data", "--input", str(text)),
            *("--output-prefix", str(options.output / "python"), "--append-eod", "--overwrite"),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{tokenizer}.model"),
        ],
        check=True,
    )
    text.unlink()
    size = (options.output / "python_text_document.bin").stat().st_size
    print(f"{size / 2**20:.1f} MiB of tokens in {options.output}")


if __name__ == "__main__":
    main()
