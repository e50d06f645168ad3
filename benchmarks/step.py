"""What Peri-LN's output norms cost a training step on one GPU, next to Pre-LN and an unfused Peri-LN.

One model, optimizer and batch; the variants exchange only what joins a sublayer with the residual
stream, and take turns step by step, in an order that rotates. Prints a table, writes JSON with
every sample.

    python benchmarks/step.py --size 1.5B
    python benchmarks/step.py --size 1.5B --fp8 delayed --profile
    python benchmarks/step.py --size tiny --device cpu --rounds 3

Variants: ``pre``; ``peri``, whose norms are computed as --norm-backend auto says, or
``peri:compile`` and so on; ``fused-next``, the same with --fuse-pre-mlp-norm; ``unfused``, a norm of
its own kernel (Transformer Engine's), then Megatron's fused bias-dropout-add.
MFU counts causal attention at half its square, against --peak-tflops.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from machine import command, machine
from one_process import start_megatron
from step_model import SIZES, Trainer, causal_flops

WARM_UP = 3


def timed_step(trainer: Trainer, variant: str) -> tuple[float, int]:
    """Return the seconds and the peak bytes of one step."""
    trainer.take(variant)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    trainer.step()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated()


def measure(trainer: Trainer, variants: list[str], rounds: int) -> dict[str, list[tuple[float, int]]]:
    """Return ``(seconds, peak bytes)`` of every step of every variant, one a round."""
    samples: dict[str, list[tuple[float, int]]] = {variant: [] for variant in variants}
    for turn in range(rounds + WARM_UP):
        shift = turn % len(variants)
        for variant in variants[shift:] + variants[:shift]:
            sample = timed_step(trainer, variant)
            if turn >= WARM_UP:
                samples[variant].append(sample)
    return samples


def summarize(
    samples: dict[str, list[tuple[float, int]]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row a variant; ratios are to the first variant in the same round."""
    tokens = options.micro_batch_size * options.num_microbatches * options.seq_length
    flops = causal_flops(SIZES[options.size], tokens, options.seq_length)
    baseline, *_ = samples.values()
    rows = []
    for variant, taken in samples.items():
        seconds = statistics.median(sample[0] for sample in taken)
        ratios = [mine[0] / first[0] for mine, first in zip(taken, baseline, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
        rows.append(
            {
                "variant": variant,
                "ms": 1e3 * seconds,
                "tokens_per_second": tokens / seconds,
                "mfu": flops / seconds / (1e12 * options.peak_tflops),
                "peak_gb": max(sample[1] for sample in taken) / 1e9,
                "over_first": quartiles,
                "samples_s": [sample[0] for sample in taken],
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print a line a variant."""
    first = rows[0]["variant"]
    print(
        f"{'variant':<16}{'ms':>9}{'tokens/s':>10}{'MFU':>7}{'GB':>7}{f'over {first}':>11}{'quartiles':>18}"
    )
    for row in rows:
        low, middle, high = row["over_first"]
        print(
            f"{row['variant']:<16}{row['ms']:>9.1f}{row['tokens_per_second']:>10.0f}{row['mfu']:>7.1%}"
            f"{row['peak_gb']:>7.1f}{middle:>11.4f}{f'{low:.4f} .. {high:.4f}':>18}"
        )


def profile(trainer: Trainer, variants: list[str], steps: int = 3) -> dict[str, dict[str, float]]:
    """Return the milliseconds a step that each kernel takes, by variant."""
    from torch.profiler import ProfilerActivity

    on_gpu = trainer.options.device == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    table: dict[str, dict[str, float]] = {}
    for variant in variants:
        timed_step(trainer, variant)
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(steps):
                timed_step(trainer, variant)
        times: dict[str, float] = defaultdict(float)
        for event in profiler.key_averages():
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            times[event.key] += microseconds / 1e3 / steps
        table[variant] = dict(times)
    return table


def print_profile(table: dict[str, dict[str, float]], lines: int = 12) -> None:
    """Print the kernels in which each variant differs most from the first."""
    (first, baseline), *others = table.items()
    for variant, times in others:
        change = {name: times.get(name, 0.0) - baseline.get(name, 0.0) for name in times | baseline}
        print(f"\n{variant} over {first}, ms a step: {sum(change.values()):+.3f} in all kernels")
        for name in sorted(change, key=lambda name: -abs(change[name]))[:lines]:
            print(f"{change[name]:>+10.3f}  {times.get(name, 0.0):>10.3f}  {name[:90]}")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=tuple(SIZES), default="1.5B")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--num-microbatches", type=int, default=2)
    parser.add_argument("--fp8", choices=("delayed", "tensorwise", "blockwise", "mxfp8"), default=None)
    parser.add_argument(
        "--transformer-impl", choices=("local", "transformer_engine"), default="transformer_engine"
    )
    parser.add_argument(
        "--no-gradient-accumulation-fusion", action="store_true", help="not Megatron's default; as on the CPU"
    )
    parser.add_argument("--variants", nargs="+", default=["pre", "peri", "fused-next", "unfused"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of one GPU; default: Hopper's bf16")
    parser.add_argument("--profile", action="store_true", help="also tell which kernels the time goes to")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.device == "cpu":
        options.transformer_impl = "local"
    start_megatron(options.device, options.micro_batch_size, options.num_microbatches)
    trainer = Trainer(options)
    samples = measure(trainer, options.variants, options.rounds)
    rows = summarize(samples, options)
    print_table(rows)
    kernels = profile(trainer, options.variants) if options.profile else {}
    if kernels:
        print_profile(kernels)
    if options.output:
        report = {
            "device": machine(),
            "command": command(),
            "settings": {key: str(value) for key, value in vars(options).items()},
            "results": rows,
            "kernels_ms": kernels,
        }
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
