"""The fast path of Megatron-LM's main, rebuilt from its published structure.

gigatoken reads, parses and encodes the whole file with threads; numpy flattens the result, inserts the
end-of-document tokens and writes it in one go. Hugging Face tokenizers only.
Source: tools/preprocess_data_fast.py and ``IndexedDatasetBuilder.add_documents`` (pull request 6514).
"""

from __future__ import annotations

import argparse

import awkward  # type: ignore[import-untyped]
import gigatoken
import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import _add_tokenizer_args


def main() -> None:
    """Encode the input file into one dataset."""
    parser = _add_tokenizer_args(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--input", required=True)
    parser.add_argument("--output-prefix", required=True)
    parser.add_argument("--append-eod", action="store_true")
    args = parser.parse_args()
    args.rank = 1
    args.make_vocab_size_divisible_by = 128
    args.tensor_model_parallel_size = 1
    tokenizer = build_tokenizer(args)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    # Megatron's wrapper holds the transformers tokenizer that gigatoken is made from.
    encoder = gigatoken.Tokenizer(tokenizer._tokenizer.tokenizer).as_hf().tokenizer
    rows = encoder.encode_files(gigatoken.JsonlFileSource([args.input], field="text"), parallel=True)

    prefix = f"{args.output_prefix}_text_document"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    tokens = np.asarray(awkward.flatten(rows), dtype=dtype)
    lengths = np.asarray(awkward.num(rows, axis=1))
    if args.append_eod:
        tokens = np.insert(tokens, np.cumsum(lengths), tokenizer.eod).astype(dtype, copy=False)
        lengths = lengths + 1
    builder.data_file.write(tokens.tobytes(order="C"))
    builder.sequence_lengths.extend(lengths.tolist())
    builder.document_indices.extend(range(1, len(lengths) + 1))
    builder.finalize(f"{prefix}.idx")


if __name__ == "__main__":
    main()
