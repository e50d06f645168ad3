"""Train a tokenizer on text, in a format that Megatron loads."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_periln.command_line import exit_code, parse_flags, parse_size, run_command
from megatron_periln.data.readers.inputs import find_inputs
from megatron_periln.data.tokenizer_training.child import in_child
from megatron_periln.data.tokenizer_training.sampling import read_texts, take_sample
from megatron_periln.data.tokenizer_training.train import (
    EOS_TOKEN,
    SPLITS,
    train_huggingface,
    train_sentencepiece,
)
from megatron_periln.data.tokenizer_training.trained import Trained, measure, prepare_folder, prepare_model
from megatron_periln.errors import PreprocessError

__all__ = ["build_parser", "main"]

_ONLY_FOR = {
    "SentencePieceTokenizer": ("model_type", "no_byte_fallback"),
    "HuggingFaceTokenizer": ("split", "eos_token"),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    group = parser.add_argument_group("input data")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="JSON Lines, Parquet, plain text, compressed or not: files, quoted globs, folders; - for stdin",
    )
    group.add_argument("--json-keys", nargs="+", default=["text"], help="JSON keys of the texts")
    group.add_argument(
        "--sample-bytes",
        type=parse_size,
        default="100M",
        metavar="SIZE",
        help="train on so much text: 500M, 2G; training needs 4 times as much memory, SentencePiece 10 "
        "times, its unigram models 25 times; default: 100M",
    )
    group.add_argument(
        "--sampling",
        choices=("reservoir", "prefix"),
        default="reservoir",
        help="reservoir: a random sample of all the input, which is read to its end; prefix: its start",
    )
    group.add_argument("--seed", type=int, default=1234, help="of the random sample")
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", choices=tuple(_ONLY_FOR), required=True)
    group.add_argument("--vocab-size", type=int, required=True, help="number of ids, special tokens included")
    group.add_argument(
        "--special-tokens", nargs="+", default=[], help="each is one token wherever it stands in a text"
    )
    group.add_argument(
        "--model-type", choices=("bpe", "unigram"), help="of SentencePieceTokenizer; default: bpe"
    )
    group.add_argument(
        "--no-byte-fallback",
        action="store_true",
        default=None,
        help="of SentencePieceTokenizer: unknown characters and line ends become <unk>, not bytes",
    )
    group.add_argument(
        "--split", choices=tuple(SPLITS), help="how HuggingFaceTokenizer splits words; default: llama3"
    )
    group.add_argument(
        "--eos-token", help=f"end-of-document token of HuggingFaceTokenizer; default: {EOS_TOKEN}"
    )
    group = parser.add_argument_group("output data")
    group.add_argument(
        "--output", required=True, type=Path, help="a .model file of SentencePieceTokenizer, or a folder"
    )
    group.add_argument("--overwrite", action="store_true", help="replace a tokenizer that exists")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train and return the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    return exit_code(lambda: _train(parse_flags(build_parser(), argv)))


def _train(args: argparse.Namespace) -> None:
    kind = args.tokenizer_type
    for name in (name for other, names in _ONLY_FOR.items() if other != kind for name in names):
        if getattr(args, name) is not None:
            raise PreprocessError(f"--{name.replace('_', '-')} is not for {kind}: drop it")
    inputs = find_inputs(args.input)
    train: Callable[..., Trained] = train_sentencepiece
    options: dict[str, Any] = {"vocab_size": args.vocab_size, "special_tokens": args.special_tokens}
    if kind == "SentencePieceTokenizer":
        prepare_model(args.output, overwrite=args.overwrite)
        options |= {"model_type": args.model_type or "bpe", "byte_fallback": not args.no_byte_fallback}
    else:
        prepare_folder(args.output, overwrite=args.overwrite)
        train = train_huggingface
        options |= {"split": args.split or "llama3", "eos_token": args.eos_token or EOS_TOKEN}
    seed = args.seed if args.sampling == "reservoir" else None
    sample = take_sample(read_texts(inputs, args.json_keys), args.sample_bytes, seed=seed)
    size = sum(map(len, sample.train))
    print(f"Training on {size:,} bytes of the {sample.bytes_seen:,} read", file=sys.stderr)
    tokenizer = in_child(train, sample.train, **options)
    tokenizer.write(args.output)
    held_out = "held-out text" if sample.held_out else "the training text"
    print(f"Wrote {args.output}: {tokenizer.vocab_size} ids; end-of-document token {tokenizer.eod}")
    print(f"On {held_out}: {measure(tokenizer, sample.held_out or sample.train)}")
    print("For tools/preprocess_data.py and training:")
    print(f"  --tokenizer-type {kind} --tokenizer-model {shlex.quote(str(args.output))}")


if __name__ == "__main__":
    run_command(main)
