"""What `megatron_periln.plan` says a rank holds, against what ranks held.

On the CPU, real jobs of 1 to 8 processes in 12 layouts: weights, gradients and optimizer state must be equal
to the byte, saved activations within 5 %. And the peaks that one H100 showed (benchmarks/step.py, 1.5B), of
which the plan must be within 5 %. Prints tables, writes JSON.

    python benchmarks/plan.py --output benchmarks/results/plan.json
    python benchmarks/plan.py --layouts TP2 PP2
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import resource
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import command, machine

from megatron_periln import cpu

SAVED_MAY_DIFFER = 0.05
EXACT = ("weights", "gradients", "master weights", "moments")

_DENSE = (
    "--num-layers 4 --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2"
)
_MOE = (
    f"{_DENSE} --num-experts 4 --moe-layer-freq [0,1,0,1] --moe-router-topk 2 --moe-ffn-hidden-size 64 "
    "--moe-aux-loss-coeff 0 --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall"
)
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
_SELECTIVE = "--recompute-granularity selective --recompute-modules layernorm core_attn"
_VPP = "--num-virtual-stages-per-pipeline-rank 2"

LAYOUTS: dict[str, tuple[int, str]] = {
    "1": (1, f"{_DENSE} --norm-placement peri"),
    "TP2": (2, f"{_DENSE} --norm-placement pre --bf16 --tensor-model-parallel-size 2"),
    "TP2+SP": (2, f"{_DENSE} --norm-placement peri --tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2": (2, f"{_DENSE} --norm-placement post --bf16 --pipeline-model-parallel-size 2"),
    "PP2xVPP2": (2, f"{_DENSE} --norm-placement peri --pipeline-model-parallel-size 2 {_VPP}"),
    "CP2": (2, f"{_DENSE} --norm-placement output --context-parallel-size 2"),
    "DP2, distributed optimizer": (2, f"{_DENSE} --norm-placement peri --bf16 --use-distributed-optimizer"),
    "EP2": (2, f"{_MOE} --norm-placement peri --expert-model-parallel-size 2"),
    "full recomputation": (1, f"{_DENSE} --norm-placement peri --bf16 {_FULL}"),
    "selective recomputation": (1, f"{_DENSE} --norm-placement peri --bf16 {_SELECTIVE}"),
    "TP2xPP2+SP, distributed optimizer": (
        4,
        f"{_DENSE} --norm-placement peri --bf16 --tensor-model-parallel-size 2 --sequence-parallel "
        "--pipeline-model-parallel-size 2 --use-distributed-optimizer",
    ),
    "TP2xPP2xDP2+SP, distributed optimizer, overlap": (
        8,
        f"{_DENSE} --norm-placement pre --bf16 --tensor-model-parallel-size 2 --sequence-parallel "
        "--pipeline-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce "
        "--overlap-param-gather",
    ),
}
"""Processes and flags."""

_LARGE = (
    "--num-layers 28 --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 16 --seq-length 4096 "
    "--max-position-embeddings 4096 --micro-batch-size 2 --global-batch-size 4 "
    "--tokenizer-type NullTokenizer --vocab-size 100350 --swiglu --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights --bf16 "
    "--use-distributed-optimizer --hidden-dropout 0 --attention-dropout 0 --cross-entropy-loss-fusion "
    "--train-iters 10 --lr 1e-4 --mock-data"
)
H100 = {
    "1.5B pre": (f"{_LARGE} --norm-placement pre", 59.783645696),
    "1.5B peri": (f"{_LARGE} --norm-placement peri", 61.698116096),
    "1.5B pre, FP8 delayed": (f"{_LARGE} --norm-placement pre --fp8-format hybrid", 60.958509568),
    "1.5B peri, FP8 delayed": (f"{_LARGE} --norm-placement peri --fp8-format hybrid", 62.872979968),
}
"""Flags, and the peak of allocated GB of benchmarks/step.py on an H100 with Transformer Engine 2.17.1."""


def compare(flags: list[str], live: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each rank that the plan describes: by what it is the bytes planned, and found."""
    from megatron_periln.plan.ranks import plan_ranks

    _, plans = plan_ranks(flags, len(live))
    found = {line["rank"]: line for line in live}
    rows = []
    for plan in plans:
        line = found[plan.rank]
        rows.append(
            {
                "rank": plan.rank,
                "name": plan.name,
                **{name: (plan.memory.get(name, 0), line[name]) for name in EXACT},
                "saved": list(zip(plan.saved_per_microbatch, line["saved"], strict=True)),
            }
        )
    return rows


def wrong(row: dict[str, Any]) -> list[str]:
    """Return what of a row the plan had wrong."""
    found = [name for name in EXACT if row[name][0] != row[name][1]]
    off = any(abs(planned / live - 1) > SAVED_MAY_DIFFER for planned, live in row["saved"])
    return [*found, "saved"] if off else found


def _live(jobs: Any, number: int, ranks: int, flags: str) -> tuple[list[str], list[dict[str, Any]]]:
    from tests.parallel.jobs import COMMON

    short = "--mock-data --train-iters 2 --lr-decay-iters 2 --lr-warmup-iters 0 --save-interval 100"
    given = f"{flags} --vocab-size 255 {short}"
    finished = jobs.run(
        f"plan-{number}", given, ranks, changes=["tests.parallel.held_live.count_what_is_held"], timeout=600
    )
    lines = [json.loads(line) for line in re.findall("^held (.*)", finished.log, re.MULTILINE)]
    return shlex.split(f"{COMMON} {given}"), lines


def _run_layouts(options: argparse.Namespace) -> dict[str, Any]:
    from tests.parallel.jobs import Jobs

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        jobs = Jobs(Path(folder), Path(folder))
        try:
            for number, name in enumerate(options.layouts):
                ranks, flags = LAYOUTS[name]
                given, lines = _live(jobs, number, ranks, flags)
                results[name] = {"processes": ranks, "flags": flags, "ranks": compare(given, lines)}
                for row in results[name]["ranks"]:
                    saved = ", ".join(f"{planned / live - 1:+.2%}" for planned, live in row["saved"])
                    verdict = ", ".join(wrong(row)) or "exact"
                    print(f"{name:<48}{row['name']:<13}{verdict:<24}saved activations {saved}", flush=True)
        finally:
            jobs.close()
    return results


def _run_h100(_: argparse.Namespace) -> dict[str, Any]:
    from megatron_periln.plan.ranks import plan_ranks

    results = {}
    for name, (flags, peak) in H100.items():
        _, (plan,) = plan_ranks(flags.split(), 1)
        gb = plan.total / 1e9
        results[name] = {"planned_gb": gb, "peak_gb": peak, "memory": plan.memory}
        print(f"{name:<24}planned {gb:.2f} GB, H100 {peak:.2f} GB, {gb / peak - 1:+.2%}", flush=True)
    return results


def _run_speed(_: argparse.Namespace) -> dict[str, Any]:
    from megatron_periln.plan.ranks import plan_ranks

    results = {}
    for name, flags in SPEED.items():
        for world_size in (1024, 16384):
            start, worked = time.perf_counter(), time.process_time()
            plan_ranks(flags.split(), world_size)
            row = {
                "wall_s": time.perf_counter() - start,
                "cpu_s": time.process_time() - worked,
                "peak_resident_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            }
            results[f"{name}, {world_size} GPUs"] = row
            print(
                name, world_size, "GPUs:", *(f"{key} {value:.1f}" for key, value in row.items()), flush=True
            )
    return results


_WIDE = (
    "--tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 8 "
    "--micro-batch-size 1 --global-batch-size 16384 --eval-iters 0 --tokenizer-type NullTokenizer --swiglu "
    "--normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --bf16 --use-distributed-optimizer --overlap-grad-reduce "
    "--overlap-param-gather --hidden-dropout 0 --attention-dropout 0 --cross-entropy-loss-fusion "
    "--train-iters 10 --lr 1e-4 --mock-data --norm-placement peri"
)
SPEED = {
    "3.2B": f"{_WIDE} --num-layers 32 --hidden-size 2816 --ffn-hidden-size 7680 --num-attention-heads 32 "
    "--seq-length 4096 --max-position-embeddings 4096 --vocab-size 100350 "
    "--num-layers-per-virtual-pipeline-stage 2",
    "70B": f"{_WIDE} --num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64 "
    "--group-query-attention --num-query-groups 8 --seq-length 8192 --max-position-embeddings 8192 "
    "--vocab-size 128254 --num-layers-per-virtual-pipeline-stage 5",
}
"""TP8 x PP8 x VPP."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layouts", nargs="*", choices=tuple(LAYOUTS), default=list(LAYOUTS))
    parts = ["H100", "layouts", "speed"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--output", type=Path, default=None, help="a JSON file")
    options = parser.parse_args()
    cpu.activate(hide_gpu=True)
    logging.disable(logging.WARNING)
    report: dict[str, Any] = {"device": machine(), "command": command()}
    for part in options.parts:
        report[part] = {"H100": _run_h100, "layouts": _run_layouts, "speed": _run_speed}[part](options)
        if options.output:
            options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
