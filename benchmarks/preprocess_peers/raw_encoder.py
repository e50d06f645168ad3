"""The ceiling: gigatoken alone, over texts that are in memory and already parsed.

Only encoding is timed: from the moment all processes have their tokenizer and their share of the texts
until the last has encoded it. Nothing is kept, sent or written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from itertools import islice
from pathlib import Path
from typing import Any

_BATCH = 1 << 20


def load(model: Path) -> Any:
    """Return gigatoken's tokenizer for a tokenizer.json, a .tiktoken file or a SentencePiece model."""
    import gigatoken
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    if model.suffix == ".json":
        return gigatoken.Tokenizer(model)
    if model.suffix == ".tiktoken":
        return gigatoken.Tokenizer.from_tiktoken(model, "nemotron")  # Megatron's pattern v2
    content = json.loads(sentencepiece_to_tokenizer_json(model.read_bytes()))
    # SentencePiece never finds its control pieces in a text.
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    return gigatoken.Tokenizer.from_json(json.dumps(content))


def batches(path: Path, worker: int, workers: int) -> list[list[str]]:
    """Return every ``workers``-th text from the ``worker``-th on, in batches of about 1 MB."""
    result: list[list[str]] = [[]]
    size = 0
    with path.open("rb") as stream:
        for line in islice(stream, worker, None, workers):
            if size > _BATCH:
                result.append([])
                size = 0
            result[-1].append(json.loads(line)["text"])
            size += len(line)
    return result


def encode(args: argparse.Namespace, worker: int, barrier: Any, results: Any) -> None:
    """Encode a share of the texts; put its start, end, CPU seconds and tokens."""
    tokenizer = load(args.model)
    share = batches(args.input, worker, args.workers)
    barrier.wait()
    start, cpu = time.monotonic(), time.process_time()
    tokens = 0
    for batch in share:
        tokens += len(tokenizer.encode_batch(batch, parallel=False).layout.content)
    results.put((start, time.monotonic(), time.process_time() - cpu, tokens))


def main() -> None:
    """Encode and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="takes the seconds, as JSON")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(args.workers), context.Queue()
    processes = [
        context.Process(target=encode, args=(args, worker, barrier, results))
        for worker in range(args.workers)
    ]
    for process in processes:
        process.start()
    starts, ends, cpu, tokens = zip(*(results.get() for _ in processes), strict=True)
    for process in processes:
        process.join()
    result = {"seconds": max(ends) - min(starts), "cpu_seconds": sum(cpu), "tokens": sum(tokens)}
    args.output.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
