"""What each norm placement costs: step time relative to Pre-LN, measured side by side in one run.

Forward and backward of one GPT in one process, the placements taking turns so that they share
whatever the machine is doing. Prints a table and writes JSON.

    python benchmarks/placement_cost.py --device cpu
    python benchmarks/placement_cost.py --hidden-size 2048 --num-layers 24 --seq-length 4096 --bf16
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import command, machine
from one_process import build_gpt, start_megatron


def step(model: Any, tokens: torch.Tensor, positions: torch.Tensor) -> float:
    """Run one forward and backward pass; return its seconds."""
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    model(tokens, positions, None, labels=tokens).mean().backward()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--transformer-impl", choices=("local", "transformer_engine"), default="local")
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-attention-heads", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=None, help="a JSON file")
    options = parser.parse_args()
    start_megatron(options.device, options.micro_batch_size)
    from megatron_periln.norms import PLACEMENTS

    shape = (options.micro_batch_size, options.seq_length)
    tokens = torch.randint(0, options.vocab_size, shape, device="cuda")
    positions = torch.arange(options.seq_length, device="cuda").expand(shape)
    models = {name: build_gpt(options, name) for name in PLACEMENTS}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(options.rounds + 3):
        for name, model in models.items():
            taken = step(model, tokens, positions)
            if turn >= 3:
                seconds[name].append(taken)

    results = []
    for name, taken in seconds.items():
        ratios = [mine / pre for mine, pre in zip(taken, seconds["pre"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        median = 1e3 * statistics.median(taken)
        results.append({"placement": name, "ms": median, "over_pre": [low, middle, high]})
    print(f"{'placement':<12}{'ms':>10}{'over pre':>12}{'quartiles':>20}")
    for row in results:
        low, middle, high = row["over_pre"]
        print(f"{row['placement']:<12}{row['ms']:>10.1f}{middle:>12.3f}{f'{low:.3f} .. {high:.3f}':>20}")
    if options.output:
        settings = {key: str(value) for key, value in vars(options).items()}
        report = {"device": machine(), "command": command(), "settings": settings, "results": results}
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
