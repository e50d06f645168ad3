"""The norm kernels beside those of other libraries: time and GB/s, forward and backward.

GB/s counts the bytes that the operation can't do without: forward, sublayer output and residual are
read and the result is written; backward, the gradient and the sublayer output are read and the
latter's gradient is written. With the next norm, its result is written too, and backward its gradient and
the sum are read and the residual's gradient is written. The share is that of a copy's bandwidth,
measured in the same run. In each round the contestants take turns.

    python benchmarks/kernel.py --output results.json
    python benchmarks/kernel.py --sweep                         # other launch configs of our kernel
    TRITON_INTERPRET=1 python benchmarks/kernel.py --device cpu --hidden-sizes 64 --tokens 32 --rounds 2
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import command, machine
from torch import Tensor

WARM_UP = 5
L2_CLEARING_BYTES = 256 * 2**20
SLEEP_CYCLES = 2_000_000  # a millisecond
SPEED = f"{'GB/s':>7}{'share':>7}"
COLUMNS = f"{'hidden':>7}  {'contestant':<34}{'forward':>10}{SPEED}{'backward':>11}{SPEED}"


def milliseconds(
    function: Callable[..., Any],
    device: str,
    prepare: Callable[[], tuple[Any, ...]] = tuple,
    repeats: int = 30,
) -> float:
    """Return the median time of ``function(*prepare())``, without that of ``prepare``.

    On a GPU nothing of it is in the L2 cache, and the GPU sleeps while the call is queued, so that what
    Python takes for that is not counted.
    """
    if device == "cpu":
        arguments, start = prepare(), time.perf_counter()
        function(*arguments)
        return 1e3 * (time.perf_counter() - start)
    cache = torch.zeros(L2_CLEARING_BYTES // 4, device=device)
    events = []
    for _ in range(WARM_UP + repeats):
        arguments = prepare()
        cache.sum()
        torch.cuda._sleep(SLEEP_CYCLES)
        start_and_end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        start_and_end[0].record()
        function(*arguments)
        start_and_end[1].record()
        events.append(start_and_end)
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events[WARM_UP:])


def inputs(tokens: int, hidden_size: int, device: str) -> tuple[list[Tensor], Tensor]:
    """Return sublayer output, residual and weight, with gradients, and the result's gradient, in bf16."""
    generator = torch.Generator(device).manual_seed(1)
    shapes = ((tokens, hidden_size), (tokens, hidden_size), (hidden_size,), (tokens, hidden_size))
    *leaves, grad = (torch.randn(s, generator=generator, device=device, dtype=torch.bfloat16) for s in shapes)
    return [torch.nn.Parameter(leaf) for leaf in leaves], grad


def time_both_passes(function: Any, leaves: list[Tensor], grad: Tensor, device: str) -> tuple[float, float]:
    """Return the milliseconds of the forward and of the backward pass."""

    def forward() -> tuple[Tensor, ...]:
        out = function(*leaves)
        return out if isinstance(out, tuple) else (out,)

    def backward(*outs: Tensor) -> None:
        torch.autograd.grad(outs, leaves, [grad] * len(outs), allow_unused=True)

    return milliseconds(forward, device), milliseconds(backward, device, prepare=forward)


def measure(
    contestants: dict[str, Any], leaves: list[Tensor], grad: Tensor, rounds: int, device: str
) -> dict[str, list[tuple[float, float]]]:
    """Return each contestant's times, one pair a round, after a round that isn't counted."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, function in contestants.items():
            taken = time_both_passes(function, leaves, grad, device)
            if turn:
                times[name].append(taken)
    return times


def other_launch_configs(hidden_size: int, with_next: bool) -> dict[str, Any]:
    """Return our kernel by launch config: block, rows, warps, programs on a multiprocessor, stages."""
    from kernel_contestants import EPS

    from megatron_periln.norms.kernels import fused
    from megatron_periln.norms.kernels.launch_config import (
        MAX_NORM_ADD_NORM_HIDDEN_SIZE,
        LaunchConfig,
        choose_launch_config,
    )

    if with_next and hidden_size > MAX_NORM_ADD_NORM_HIDDEN_SIZE:
        return {}

    def norm_add(config: Any, sublayer_output: Tensor, residual: Tensor, weight: Tensor) -> Any:
        fused.choose_launch_config = lambda *_: config  # holds for the backward pass, which is timed next
        given = (sublayer_output, None, residual, weight, None, EPS, False, 0.0, True)
        if with_next:
            return fused.norm_add_norm(*given, weight, None, EPS, sublayer_output.dtype)
        return fused.norm_add(*given)

    shipped = choose_launch_config(hidden_size, with_next=with_next)
    warps = sorted({max(1, shipped.num_warps // 2), shipped.num_warps, min(32, 2 * shipped.num_warps)})
    configs = [
        shipped._replace(num_warps=count, programs_per_sm=programs, stages=stages)
        for count, programs, stages in itertools.product(warps, (1, 2, 4, 8), (1, 2))
    ]
    if shipped.block > 4096:  # rows read in parts
        configs += [LaunchConfig(4096, 1, 8, programs) for programs in (1, 2, 4)]
    return {str(tuple(config)): functools.partial(norm_add, config) for config in configs}


def rows(
    kind: str, times: dict[str, list[tuple[float, float]]], hidden_size: int, tokens: int, copy: float
) -> list[dict[str, Any]]:
    """Return a row a contestant; ``copy`` is the copy's bandwidth in GB/s."""
    with_next = kind.startswith("norm_add_norm")
    passes = {"forward": 4, "backward": 6} if with_next else {"forward": 3, "backward": 3}
    table = []
    for contestant, taken in times.items():
        row: dict[str, Any] = {
            "kind": kind,
            "hidden_size": hidden_size,
            "contestant": contestant,
            "samples_ms": taken,
        }
        for index, name in enumerate(("forward", "backward")):
            median = statistics.median(pair[index] for pair in taken)
            speed = passes[name] * tokens * hidden_size * 2 / 1e9 / (median / 1e3)
            row |= {f"{name}_ms": median, f"{name}_gb_s": speed, f"{name}_share": speed / copy}
        table.append(row)
        print(
            f"{hidden_size:>7}  {contestant:<34}"
            f"{row['forward_ms']:>10.4f}{row['forward_gb_s']:>7.0f}{row['forward_share']:>7.0%}"
            f"{row['backward_ms']:>11.4f}{row['backward_gb_s']:>7.0f}{row['backward_share']:>7.0%}",
            flush=True,
        )
    return table


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[1024, 2048, 2560, 3072, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=16384, help="rows of the sublayer output")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sweep", action="store_true", help="time other launch configs instead")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file")
    options = parser.parse_args()
    if options.device == "cpu":
        from megatron_periln import cpu

        cpu.activate()
    from kernel_contestants import (
        add_norm_contestants,
        norm_add_contestants,
        norm_add_norm_contestants,
    )

    from megatron_periln.norms.kernels import fused

    device, tokens, shipped = options.device, options.tokens, fused.choose_launch_config
    results: list[dict[str, Any]] = []
    copies = {}
    print(COLUMNS)
    for hidden_size in options.hidden_sizes:
        torch._dynamo.reset()  # compile for this size, not for any
        leaves, grad = inputs(tokens, hidden_size, device)
        copy = functools.partial(torch.empty_like(grad).copy_, grad)
        copied = statistics.median(milliseconds(copy, device) for _ in range(5))
        copies[hidden_size] = 2 * grad.nbytes / 1e9 / (copied / 1e3)
        print(f"{hidden_size:>7}  {'copy':<34}{copied:>10.4f}{copies[hidden_size]:>7.0f}")
        kinds = {
            "norm_add": norm_add_contestants,
            "norm_add_norm": norm_add_norm_contestants,
            "add_norm": add_norm_contestants,
        }
        groups = {kind: contestants(device, hidden_size) for kind, contestants in kinds.items()}
        if options.sweep:
            groups = {
                f"{kind} launches": other_launch_configs(hidden_size, kind == "norm_add_norm")
                for kind in ("norm_add", "norm_add_norm")
            }
        for kind, contestants in groups.items():
            times = measure(contestants, leaves, grad, options.rounds, device)
            results += rows(kind, times, hidden_size, tokens, copies[hidden_size])
        fused.choose_launch_config = shipped
        if options.output:  # after each size, for a run that is cut off
            report = {
                "device": machine(),
                "command": command(),
                "settings": {key: str(value) for key, value in vars(options).items()},
                "copy_gb_s": copies,
                "results": results,
            }
            options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
