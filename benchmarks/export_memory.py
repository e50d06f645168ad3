"""How much memory an export takes, relative to the model in bf16.

Writes a checkpoint with random weights, exports it with tools/export_hf.py --no-verify in a process
of its own, and reads that process's peak of resident memory, its libraries and mapped files included.
Prints a line and writes JSON.

    python benchmarks/export_memory.py --output results.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_checkpoint(folder: Path, options: argparse.Namespace) -> None:
    """Write a Peri-LN checkpoint with random weights, in bf16."""
    from megatron_periln import cpu

    cpu.activate(hide_gpu=True)
    import torch

    from megatron_periln.convert.architecture import Architecture, Rope
    from megatron_periln.convert.megatron_flags import model_arguments
    from megatron_periln.models.one_process import build_model, megatron_config, save_model, single_process
    from megatron_periln.norms import PERI

    architecture = Architecture(
        placement=PERI,
        eps=1e-5,
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        ffn_hidden_size=4 * options.hidden_size,
        num_heads=options.hidden_size // 128,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=options.vocab_size,
        max_positions=4096,
        rope=Rope(theta=10000),
    )
    args = model_arguments(architecture, torch.bfloat16)
    with single_process(), torch.no_grad():
        model = build_model(megatron_config(args, torch.bfloat16))
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        save_model(folder, args, model)


def export(load: Path, output: Path, shard: str) -> dict[str, float]:
    """Export in a process of its own; return its peak memory in bytes and its seconds."""
    command = [sys.executable, str(ROOT / "tools" / "export_hf.py"), "--no-verify", "--max-shard-size", shard]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--load", str(load), "--output", str(output)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the export ended with {os.waitstatus_to_exitcode(status)}")
    return {"peak_bytes": usage.ru_maxrss * 1024, "seconds": time.perf_counter() - start}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=64000)
    parser.add_argument("--max-shard-size", default="1G")
    parser.add_argument("--work", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="the JSON to write")
    parser.add_argument("--write-checkpoint", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write_checkpoint:
        write_checkpoint(options.write_checkpoint, options)
        return
    work = Path(tempfile.mkdtemp(dir=options.work))
    try:
        (work / "checkpoint").mkdir()
        subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--write-checkpoint", work / "checkpoint"], check=True
        )
        result = export(work / "checkpoint", work / "model", options.max_shard_size)
        result["model_bytes"] = sum(file.stat().st_size for file in (work / "model").glob("*.safetensors"))
    finally:
        shutil.rmtree(work)
    result["ratio"] = result["peak_bytes"] / result["model_bytes"]
    gib = {name: f"{result[name] / 2**30:.2f} GiB" for name in ("peak_bytes", "model_bytes")}
    print(
        f"model {gib['model_bytes']} in bf16, peak {gib['peak_bytes']}: {result['ratio']:.2f} times the "
        f"model, in {result['seconds']:.0f} s"
    )
    if options.output:
        options.output.write_text(json.dumps({**vars(options), **result}, default=str, indent=2) + "\n")


if __name__ == "__main__":
    main()
