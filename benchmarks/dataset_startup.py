"""Start-up of Megatron's GPT datasets, as stock megatron.core does it and through our launch path.

Synthetic indexed datasets of many short documents; stock and ours take turns in one process, each
building the indices without a cache, loading them with one, and loading them with nothing in memory.

    python benchmarks/dataset_startup.py --documents 10_000_000
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from machine import command, machine

STATES = ("build", "load", "load from disk")
MEAN_TOKENS = 50


def write_dataset(prefix: Path, documents: int, seed: int) -> None:
    """Write ``documents`` of 1 to 99 tokens; the tokens are zeros that take no disk."""
    from megatron_periln.data.indexed.format import HEADER, MAGIC, VERSION

    lengths = np.random.default_rng(seed).integers(1, 2 * MEAN_TOKENS, documents, dtype=np.int32)
    ends = 2 * np.cumsum(lengths, dtype=np.int64)
    with Path(f"{prefix}.idx").open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1))
        lengths.tofile(stream)
        (ends - 2 * lengths).tofile(stream)
        np.arange(documents + 1, dtype=np.int64).tofile(stream)
    with Path(f"{prefix}.bin").open("wb") as stream:
        stream.truncate(int(ends[-1]))


def launch_arguments(options: argparse.Namespace, prefixes: list[Path], cache: Path) -> argparse.Namespace:
    """Return the arguments of a training run on ``prefixes``, parsed as a launch does."""
    from megatron.training.global_vars import unset_global_variables

    from megatron_periln.training.parsing import parse

    unset_global_variables()
    data = [word for prefix in prefixes for word in (["1.0"] if len(prefixes) > 1 else []) + [str(prefix)]]
    flags = f"""--num-layers 1 --hidden-size 64 --num-attention-heads 1 --micro-batch-size 1
        --seq-length {options.seq_length} --max-position-embeddings {options.seq_length} --train-iters 1
        --tokenizer-type NullTokenizer --vocab-size 1000 --split 969,30,1 --lr 1e-4 --eval-interval 1000
        --transformer-impl local --device {options.device} --data-cache-path {cache} --data-path"""
    sys.argv = ["dataset_startup", *flags.split(), *data]
    with redirect_stdout(io.StringIO()):  # Megatron prints every argument
        return parse()


def stock(sizes: list[int]) -> Any:
    """Build the datasets as Megatron-LM's pretrain_gpt.py does, from the same configuration."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.training import get_args

    from megatron_periln.training.datasets.gpt_datasets import dataset_config

    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, dataset_config(get_args())).build()


def ours(sizes: list[int]) -> Any:
    """Check and build the datasets as megatron_periln.pretrain does."""
    from megatron.training import get_args

    from megatron_periln.training.datasets import gpt_datasets

    gpt_datasets.check_data(get_args())
    return gpt_datasets.train_valid_test_datasets(sizes)


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Time the parts of Megatron's start-up, and our check, while in the context."""
    from megatron.core.datasets import gpt_dataset, helpers, indexed_dataset

    from megatron_periln.training.datasets import gpt_datasets

    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - started

        return call

    parts = [
        ("open", indexed_dataset.IndexedDataset, "initialize"),
        ("document index", gpt_dataset, "_build_document_index"),
        ("sample index", helpers, "build_sample_idx"),
        ("shuffle index", gpt_dataset, "_build_shuffle_index"),
        ("our check", gpt_datasets, "check_data"),
    ]
    with ExitStack() as stack:
        for name, place, attribute in parts:
            patch = mock.patch.object(place, attribute, timed(name, getattr(place, attribute)))
            stack.enter_context(patch)
        yield seconds


def forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(options: argparse.Namespace, prefixes: list[Path], cache: Path) -> list[dict[str, Any]]:
    """Let stock and ours take turns in every state; return a row for each state."""
    arguments = launch_arguments(options, prefixes, cache)
    taken: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    sizes = [options.samples, max(1, options.samples // 100), 1]
    for turn in range(options.rounds + 1):
        for state in STATES:
            contestants = {"stock": stock, "ours": ours}
            for name in sorted(contestants, reverse=bool(turn % 2)):
                arguments.data_cache_path = str(cache / name)  # the names of files in it differ
                if state == "build":
                    shutil.rmtree(cache / name, ignore_errors=True)
                if state == "load from disk":
                    forget([*(cache / name).glob("*.npy"), *(Path(f"{prefix}.idx") for prefix in prefixes)])
                started = time.perf_counter()
                with timed_parts() as parts:
                    contestants[name](sizes)
                parts["all"] = time.perf_counter() - started
                if turn:
                    taken[state, name].append(dict(parts))
    return [
        {
            "datasets": len(prefixes),
            "state": state,
            "over_stock": [
                mine["all"] / theirs["all"]
                for mine, theirs in zip(taken[state, "ours"], taken[state, "stock"], strict=True)
            ],
            "stock": taken[state, "stock"],
            "ours": taken[state, "ours"],
        }
        for state in STATES
    ]


def prepare(device: str) -> None:
    """Make this process a distributed job of one."""
    logging.disable(logging.WARNING)
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    if device == "cpu":
        from megatron_periln import cpu

        cpu.activate(hide_gpu=True)
    import torch
    from megatron.core import parallel_state

    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()


def table(rows: list[dict[str, Any]]) -> str:
    """Return the medians in Markdown, in milliseconds."""
    parts = ("open", "document index", "sample index", "shuffle index", "our check")
    names = ("datasets", "state", "stock ms", "ours ms", "ours/stock", *parts)
    lines = [f"| {' | '.join(names)} |", f"|--:|---|{'--:|' * (len(names) - 2)}"]
    for row in rows:
        middle = {
            name: {
                part: 1e3 * statistics.median(run.get(part, 0.0) for run in row[name])
                for part in (*parts, "all")
            }
            for name in ("stock", "ours")
        }
        cells = [
            str(row["datasets"]),
            row["state"],
            f"{middle['stock']['all']:.1f}",
            f"{middle['ours']['all']:.1f}",
            f"{statistics.median(row['over_stock']):.2f}",
            *(f"{middle['ours'][part]:.1f}" for part in parts),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=10_000_000, help="of each dataset")
    parser.add_argument("--blend", type=int, default=4, help="datasets in the blend")
    parser.add_argument("--samples", type=int, default=100_000, help="training samples of the run")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--work", type=Path, help="an existing folder; default: that for temporary files")
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    started_as = command()
    prepare(options.device)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        prefixes = [Path(folder, f"data-{number}") for number in range(options.blend)]
        for seed, prefix in enumerate(prefixes):
            write_dataset(prefix, options.documents, seed)
        rows = measure(options, prefixes[:1], Path(folder, "cache"))
        rows += measure(options, prefixes, Path(folder, "cache"))
    print(table(rows))
    if options.output:
        settings = {key: str(value) for key, value in vars(options).items()}
        report = {"device": machine(), "command": started_as, "settings": settings, "rows": rows}
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
