"""What Peri-LN's output norms cost a training step on one GPU, next to Pre-LN and an unfused Peri-LN.

One model, optimizer and batch; the variants exchange only what joins a sublayer with the residual
stream, and take turns step by step, in an order that rotates. Prints a table, writes JSON with
every sample.

    python benchmarks/step.py --size 1.5B
    python benchmarks/step.py --size 1.5B --fp8 delayed --profile
    python benchmarks/step.py --size 1.5B --variants pre --rounds 1 --memory       # what is held at the peak
    python benchmarks/step.py --size 1.5B --variants pre+graphs peri+graphs fused-next+graphs
    python benchmarks/step.py --size tiny --device cpu --rounds 3

Variants: ``pre``; ``peri``, whose norms are computed as --norm-backend auto says, or
``peri:compile`` and so on; ``fused-next``, the same with --fuse-pre-mlp-norm; ``unfused``, a norm of
its own kernel (Transformer Engine's), then Megatron's fused bias-dropout-add. Each with ``+graphs``: with
its layers as CUDA graphs, those of --cuda-graph-impl local.

In each round a variant takes two steps. One is timed, by the host's clock and by the GPU's events. The other
is profiled, which slows the host, and tells how long the GPU works: what is left of the timed step, it waits.
GEMMs and attention drift with the GPU's clock by more than a norm costs. So norms are compared by the other
kernels ("norm side"): all but GEMMs, attention, the optimizer and communication.
MFU counts causal attention at half its square, against --peak-tflops; "of GPU" is that of the time in which
the GPU works. On the CPU, operators stand for kernels.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import command, machine
from memory_peak import held_at_peak, print_peak, record
from one_process import start_megatron
from step_model import SIZES, Trainer, causal_flops

WARM_UP = 3
_OTHER_SIDE = re.compile(
    r"gemm|nvjet|cutlass|xmma|cublas|splitk|aten::(b?mm|(b?add)?b?mm|matmul|linear)$"  # matrix products
    r"|sdpa|fmha|flash|attention|softmax_warp"
    r"|adam|multi_tensor|aten::_?foreach|nccl",
    re.IGNORECASE,
)


class Sample(NamedTuple):
    """One round of one variant.

    Attributes
    ----------
    wall_ms
        Of the timed step, by the host.
    elapsed_ms
        Of the timed step, between events before and after it on the GPU.
    busy_ms, norm_ms
        The GPU's time in kernels of the profiled step, and in those on the norms' side of it.
    peak_bytes
        Memory.
    """

    wall_ms: float
    elapsed_ms: float
    busy_ms: float
    norm_ms: float
    peak_bytes: int


def is_norm_side(kernel: str) -> bool:
    """Tell whether a kernel, by its name, is none of GEMMs, attention, optimizer and communication."""
    return _OTHER_SIDE.search(kernel) is None


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length that ``(start, end)`` cover together: kernels on several streams overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def timed_step(trainer: Trainer, on_gpu: bool) -> tuple[float, float, int]:
    """Return the milliseconds of one step by the host's clock and by the GPU's, and the peak bytes."""
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
    start = time.perf_counter()
    for event in events[:1]:
        event.record()
    trainer.step()
    for event in events[1:]:
        event.record()
    torch.cuda.synchronize()
    wall = 1e3 * (time.perf_counter() - start)
    elapsed = events[0].elapsed_time(events[1]) if events else wall
    return wall, elapsed, torch.cuda.max_memory_allocated()


def profiled_step(trainer: Trainer, on_gpu: bool) -> tuple[float, dict[str, float]]:
    """Return the milliseconds that the GPU works in one step, and each kernel's, by name."""
    from torch.profiler import ProfilerActivity

    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        trainer.step()
        torch.cuda.synchronize()
    kernels: dict[str, float] = defaultdict(float)
    if not on_gpu:
        for event in profiler.key_averages():
            kernels[event.key] += event.self_cpu_time_total / 1e3
        return sum(kernels.values()), kernels
    spans = []
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end))
            kernels[event.name] += (event.time_range.end - event.time_range.start) / 1e3
    return covered(spans) / 1e3, kernels


def measure(
    trainer: Trainer, variants: list[str], rounds: int
) -> tuple[dict[str, list[Sample]], dict[str, dict[str, float]]]:
    """Return every variant's samples, one a round, and its kernels' milliseconds a step."""
    on_gpu = trainer.options.device == "cuda"
    samples: dict[str, list[Sample]] = {variant: [] for variant in variants}
    kernels: dict[str, dict[str, float]] = {variant: defaultdict(float) for variant in variants}
    for turn in range(rounds + WARM_UP):
        shift = turn % len(variants)
        for variant in variants[shift:] + variants[:shift]:
            trainer.take(variant)
            wall, elapsed, peak = timed_step(trainer, on_gpu)
            if turn < WARM_UP:
                continue
            busy, times = profiled_step(trainer, on_gpu)
            norm = sum(taken for name, taken in times.items() if is_norm_side(name))
            samples[variant].append(Sample(wall, elapsed, busy, norm, peak))
            for name, taken in times.items():
                kernels[variant][name] += taken / rounds
    return samples, kernels


def _quartiles(numbers: list[float]) -> list[float]:
    return statistics.quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else 3 * numbers


def summarize(samples: dict[str, list[Sample]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row a variant; ratios and differences are to the first variant in the same round.

    ``wait_share`` is the share of the timed step in which the GPU works at nothing. ``norm_over_first`` is
    the change on the norms' side as a share of the time in which the GPU works in the first variant's step.
    """
    tokens = options.micro_batch_size * options.num_microbatches * options.seq_length
    flops = causal_flops(SIZES[options.size], tokens, options.seq_length)
    first, *_ = samples.values()
    rows = []
    for variant, taken in samples.items():
        wall, elapsed, busy, norm = (
            statistics.median(sample[field] for sample in taken) for field in range(4)
        )
        pairs = list(zip(taken, first, strict=True))
        rows.append(
            {
                "variant": variant,
                "wall_ms": wall,
                "elapsed_ms": elapsed,
                "busy_ms": busy,
                "norm_ms": norm,
                "wait_share": statistics.median(max(0.0, 1 - s.busy_ms / s.elapsed_ms) for s in taken),
                "tokens_per_second": 1e3 * tokens / wall,
                "mfu": 1e3 * flops / wall / (1e12 * options.peak_tflops),
                "busy_mfu": 1e3 * flops / busy / (1e12 * options.peak_tflops),
                "peak_gb": max(sample.peak_bytes for sample in taken) / 1e9,
                "wall_over_first": _quartiles([mine.wall_ms / other.wall_ms for mine, other in pairs]),
                "norm_over_first": _quartiles(
                    [(mine.norm_ms - other.norm_ms) / other.busy_ms for mine, other in pairs]
                ),
                "samples": [sample._asdict() for sample in taken],
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print a line a variant."""
    first = rows[0]["variant"]
    heads = f"{'wall ms':>9}{'GPU ms':>9}{'waits':>7}{'MFU':>7}{'of GPU':>8}{'GB':>7}"
    print(f"{'variant':<20}{heads}{f'wall over {first}':>22}{f'norm side, of {first}':>30}")
    for row in rows:
        low, middle, high = row["wall_over_first"]
        least, norm, most = row["norm_over_first"]
        wall = f"{middle:.4f} ({low:.3f}-{high:.3f})"
        side = f"{norm:+.2%} ({least:+.2%} to {most:+.2%})"
        print(
            f"{row['variant']:<20}{row['wall_ms']:>9.1f}{row['busy_ms']:>9.1f}{row['wait_share']:>7.1%}"
            f"{row['mfu']:>7.1%}{row['busy_mfu']:>8.1%}{row['peak_gb']:>7.1f}{wall:>22}{side:>30}"
        )


def print_profile(table: dict[str, dict[str, float]], lines: int = 12) -> None:
    """Print the kernels in which each variant differs most from the first."""
    (first, baseline), *others = table.items()
    for variant, times in others:
        change = {name: times.get(name, 0.0) - baseline.get(name, 0.0) for name in times | baseline}
        norms = sum(taken for name, taken in change.items() if is_norm_side(name))
        total = sum(change.values())
        print(
            f"\n{variant} over {first}, ms a step: {total:+.3f} in all kernels, {norms:+.3f} on the norm side"
        )
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
    parser.add_argument("--num-microbatches", type=int, default=8)
    parser.add_argument("--fp8", choices=("delayed", "tensorwise", "blockwise", "mxfp8"), default=None)
    parser.add_argument(
        "--transformer-impl", choices=("local", "transformer_engine"), default="transformer_engine"
    )
    parser.add_argument(
        "--no-gradient-accumulation-fusion", action="store_true", help="not Megatron's default; as on the CPU"
    )
    parser.add_argument("--variants", nargs="+", default=["pre", "peri", "fused-next", "unfused"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of one GPU; default: Hopper's bf16")
    parser.add_argument("--profile", action="store_true", help="print which kernels the time goes to")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="print what the GPU holds at the peak of the first variant's step",
    )
    parser.add_argument("--output", type=Path, default=None, help="a JSON file")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.device == "cpu":
        options.transformer_impl = "local"
        if options.memory:
            parser.error("the CPU doesn't tell what is allocated; drop --memory")
        if any("+graphs" in variant for variant in options.variants):
            parser.error("CUDA graphs need --device cuda; drop the variants with +graphs")
    start_megatron(
        options.device,
        options.micro_batch_size,
        options.num_microbatches,
        graphs=any("+graphs" in variant for variant in options.variants),
    )
    trainer = Trainer(options)
    samples, kernels = measure(trainer, options.variants, options.rounds)
    rows = summarize(samples, options)
    print_table(rows)
    if options.profile:
        print_profile(kernels)
    report = {
        "device": machine(),
        "command": command(),
        "settings": {key: str(value) for key, value in vars(options).items()},
        "results": rows,
        "kernels_ms": kernels,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    if options.memory:
        trainer.take(options.variants[0])
        held = held_at_peak(record(trainer.step))
        print_peak(held)
        report["held_at_peak"] = [asdict(each) for each in held]
        if options.output:
            options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
