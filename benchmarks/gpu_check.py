"""Every test and benchmark that needs a GPU, one after the other, in under 20 minutes on one GPU.

    python benchmarks/gpu_check.py --output results                   # with everything installed
    python benchmarks/gpu_check.py --output results --wheels FOLDER   # a bare machine: torch, no network
    python benchmarks/gpu_check.py --output results --device cpu      # dry run: tiny, interpreted

FOLDER holds wheels (benchmarks/gpu_wheels.txt lists them) and, if Transformer Engine is not among them,
an archive ``*.tar.xz`` of its installed packages. They go to a folder of their own, which comes first on
the path; nothing is installed into the machine's Python. Each check has a time limit and a log in the
output folder; the end is a summary, and status 1 if a check failed.
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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 20 * 60
WAYS = ("pre", "peri", "fused-next")
MONITORED = (
    *("--num-layers", "24", "--hidden-size", "2048", "--num-attention-heads", "16", "--seq-length", "4096"),
    *("--micro-batch-size", "1", "--bf16", "--transformer-impl", "transformer_engine", "--rounds", "12"),
)


@dataclass(frozen=True)
class Check:
    """A command, its time limit in seconds and the GPU memory in GB that it needs."""

    name: str
    command: tuple[str, ...]
    limit: int
    memory: int = 0


def script(name: str, *arguments: str, limit: int, memory: int = 0, label: str = "") -> Check:
    """Return a check that runs a benchmark and has it write ``LABEL.json``."""
    label = label or name
    command = (
        sys.executable,
        str(ROOT / "benchmarks" / f"{name}.py"),
        *arguments,
        "--output",
        f"{label}.json",
    )
    return Check(label, command, limit, memory)


def step(label: str, *arguments: str, memory: int = 0) -> Check:
    """Return a check that measures training steps."""
    return script("step", *arguments, limit=170, memory=memory, label=f"step-{label}")


def tests(*paths: str, limit: int, label: str = "tests", under: tuple[str, ...] = ()) -> Check:
    """Return a check that runs pytest, ``under`` a tool if one is given."""
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(ROOT / path) for path in paths))
    return Check(label, (*under, sys.executable, *arguments), limit)


def checks_on_gpu() -> list[Check]:
    """Return what is run on a GPU, most telling first."""
    quick = ("--rounds", "5", "--size")
    middle, large = (*quick, "1.5B"), (*quick, "3.2B", "--micro-batch-size", "1")
    sweep = ("--sweep", "--hidden-sizes", "2048", "4096", "8192", "--rounds", "2")
    checks = [
        tests("tests/gpu", limit=400),
        script("kernel", "--rounds", "3", limit=240),
        step("1.5B-bf16", *middle, "--profile", memory=70),
        step("1.5B-fp8-delayed", *middle, "--fp8", "delayed", "--profile", memory=70),
        script("host_time", "--device", "cuda", limit=60),
        step("1.5B-graphs", *middle, "--variants", "pre", *(f"{way}+graphs" for way in WAYS), memory=70),
        step("400M-bf16", *quick, "400M", "--micro-batch-size", "4"),
        step("3.2B-bf16", *large, memory=110),
        step("3.2B-fp8-delayed", *large, "--fp8", "delayed", memory=110),
        script("kernel", *sweep, limit=200, label="kernel-sweep"),
        step("1.5B-fp8-tensorwise", *middle, "--fp8", "tensorwise", memory=70),
        script("kernel_resources", limit=240),
        script("monitor_cost", *MONITORED, limit=150, memory=60),
    ]
    if sanitizer := shutil.which("compute-sanitizer"):
        # Each tensor has memory of its own, or what lies beyond it would be the allocator's, and valid.
        allocation = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")
        under = (*allocation, sanitizer, "--error-exitcode", "1", "--report-api-errors", "no")
        checks.append(tests("tests/gpu/test_sanitized.py", limit=180, label="compute-sanitizer", under=under))
    return checks


def checks_on_cpu() -> list[Check]:
    """Return the same scripts at tiny sizes."""
    cpu = ("--device", "cpu")
    kernel = (*cpu, "--hidden-sizes", "64", "--tokens", "64", "--rounds", "1")
    tiny = (*cpu, "--size", "tiny", "--seq-length", "32", "--rounds", "2", "--profile")
    return [
        tests("tests/gpu", "tests/norms/test_fused_dropout.py", limit=200),
        script("kernel", *kernel, limit=120),
        script("kernel", *kernel, "--sweep", limit=120, label="kernel-sweep"),
        step("tiny", *tiny, "--variants", "pre", "peri", "peri:triton", "fused-next", "unfused"),
        script("host_time", "--turns", "1", "--rounds", "1", limit=120),
        script("kernel_resources", "--hidden-sizes", "2048", limit=120),
        script("monitor_cost", *cpu, "--num-layers", "2", "--hidden-size", "64", "--rounds", "2", limit=120),
    ]


def unpack(wheels: Path, site: Path) -> None:
    """Put archives and wheels of a folder into ``site``."""
    for archive in sorted(wheels.glob("*.tar.xz")):
        shutil.unpack_archive(archive, site, filter="data")
    files = [str(wheel) for wheel in sorted(wheels.glob("*.whl"))]
    if not files and not any(site.iterdir()):
        sys.exit(f"{wheels} holds no wheels and no *.tar.xz; benchmarks/gpu_wheels.txt lists what it should")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(site),
    ]
    if files:
        subprocess.run([*pip, *files], check=True)


def gpu_memory(environment: dict[str, str]) -> float:
    """Return the GPU's memory in GB."""
    command = [
        sys.executable,
        "-c",
        "import torch; print(torch.cuda.get_device_properties(0).total_memory / 1e9)",
    ]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(f"no GPU can be used; --device cpu makes a dry run\n{process.stderr.splitlines()[-1]}")
    return float(process.stdout)


def run(check: Check, output: Path, environment: dict[str, str], seconds: float) -> dict[str, object]:
    """Run one check; return its name, outcome and seconds."""
    start = time.monotonic()
    if check.name == "kernel_resources":
        environment = {name: value for name, value in environment.items() if name != "TRITON_INTERPRET"}
    with (output / f"{check.name}.log").open("w") as log:
        try:
            process = subprocess.run(
                check.command,
                cwd=output,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            )
            outcome = "passed" if process.returncode == 0 else f"failed with status {process.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {seconds:.0f} s"
    return {"check": check.name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    """Run the checks and tell what came of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--wheels", type=Path, default=None, help="a folder; default: use what is installed")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--only", nargs="+", default=None, help="names of checks")
    options = parser.parse_args()
    output: Path = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as site:
        path = [str(ROOT)]
        if options.wheels:
            unpack(options.wheels, Path(site))
            path.insert(0, site)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
        if options.device == "cpu":
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
            checks, memory = checks_on_cpu(), 0.0
        else:
            environment |= {"MEGATRON_PERILN_TEST_DEVICE": "cuda", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
            checks, memory = checks_on_gpu(), gpu_memory(environment)
        deadline = time.monotonic() + TOTAL_SECONDS
        summary = []
        for check in checks:
            if options.only and check.name not in options.only:
                continue
            left = min(check.limit, deadline - time.monotonic())
            if check.memory > memory and options.device == "cuda":
                result = {
                    "check": check.name,
                    "outcome": f"skipped: needs {check.memory} GB",
                    "seconds": 0.0,
                }
            elif left < 10:
                result = {"check": check.name, "outcome": "skipped: no time left", "seconds": 0.0}
            else:
                result = run(check, output, environment, left)
            summary.append(result)
            print(f"{result['check']:<24}{result['outcome']:<28}{result['seconds']:>7} s", flush=True)
            (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if any(not str(result["outcome"]).startswith(("passed", "skipped: needs")) for result in summary):
        sys.exit(f"not all checks passed; their logs are in {output}")


if __name__ == "__main__":
    main()
