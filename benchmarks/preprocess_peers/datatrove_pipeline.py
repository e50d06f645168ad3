"""datatrove's tokenization: JsonlReader into DocumentTokenizer, a task a worker. Runs in its own venv."""

from __future__ import annotations

import argparse

from datatrove.executor import LocalPipelineExecutor  # type: ignore[import-not-found]
from datatrove.pipeline.readers import JsonlReader  # type: ignore[import-not-found]
from datatrove.pipeline.tokens import DocumentTokenizer  # type: ignore[import-not-found]


def main() -> None:
    """Encode the files of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, help="folder, a file a worker")
    parser.add_argument("--output", required=True)
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json")
    parser.add_argument("--eos-token", required=True)
    parser.add_argument("--workers", type=int, required=True)
    args = parser.parse_args()
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(args.input, glob_pattern="*.jsonl"),
            DocumentTokenizer(
                f"{args.output}/tokens",
                args.tokenizer,
                eos_token=args.eos_token,
                shuffle_documents=False,
            ),
        ],
        tasks=args.workers,
        workers=args.workers,
        logging_dir=f"{args.output}/logs",
    ).run()


if __name__ == "__main__":
    main()
