"""Megatron-LM 0.19's preprocessing, rebuilt from its published structure on its own library.

A pool of processes, each with a tokenizer of Megatron's, takes lines by ``imap`` in chunks of 32; the
parent adds what comes back to an ``IndexedDatasetBuilder``, document by document.
Source: tools/preprocess_data.py of core_v0.19.0.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Any

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import _add_tokenizer_args


class LineEncoder:
    """Encodes one line of JSON; each process builds its own tokenizer."""

    tokenizer: Any = None

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def initialize(self) -> None:
        """Build the tokenizer of this process."""
        LineEncoder.tokenizer = build_tokenizer(self.args)

    def encode(self, line: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a line's text and the lengths of its sequences."""
        tokens: list[int] = []
        tokens.extend(LineEncoder.tokenizer.tokenize(json.loads(line)["text"]))
        if tokens and self.args.append_eod:
            tokens.append(LineEncoder.tokenizer.eod)
        return tokens, [len(tokens)] if tokens else []


def process(args: argparse.Namespace) -> None:
    """Encode the input file into one dataset."""
    encoder = LineEncoder(args)
    tokenizer = build_tokenizer(args)
    pool = multiprocessing.Pool(args.workers, initializer=encoder.initialize)
    prefix = f"{args.output_prefix}_text_document"
    with Path(args.input).open(encoding="utf-8") as lines:
        encoded = pool.imap(encoder.encode, lines, 32)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
        for tokens, lengths in encoded:
            builder.add_document(tokens, lengths)
    builder.finalize(f"{prefix}.idx")
    pool.close()
    pool.join()


def main() -> None:
    """Encode in a process of its own, as the tool does for each partition."""
    parser = _add_tokenizer_args(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--input", required=True)
    parser.add_argument("--output-prefix", required=True)
    parser.add_argument("--append-eod", action="store_true")
    parser.add_argument("--workers", type=int, required=True)
    args = parser.parse_args()
    args.rank = 1
    args.make_vocab_size_divisible_by = 128
    args.tensor_model_parallel_size = 1
    process_of_partition = multiprocessing.Process(target=process, args=(args,))
    process_of_partition.start()
    process_of_partition.join()
    raise SystemExit(process_of_partition.exitcode)


if __name__ == "__main__":
    main()
