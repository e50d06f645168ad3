"""Every test and benchmark that needs a GPU: both halves in ten minutes of one GPU, or one in six.

    python benchmarks/gpu_check.py --output results                    # tests, then benchmarks
    python benchmarks/gpu_check.py --half tests --output results
    python benchmarks/gpu_check.py --half benchmarks --output results
    ... --wheels FOLDER            # a bare machine: torch, no network
    ... --preload LIBRARY          # in every process
    ... --rehearse                 # on the CPU: tiny, interpreted, with stand-ins

FOLDER holds wheels (benchmarks/gpu_wheels.txt lists them) and, if Transformer Engine is not among them,
an archive ``*.tar.xz`` of its installed packages. They go to a folder of their own, which comes first on
the path; nothing is installed into the machine's Python. The most telling comes first. Each check has a time
limit and a log in the output folder, a line on the screen and in ``results.txt`` as it ends; what there is of
results after each half, or as this is stopped, is one archive: ``gpu-check.tar.gz``, of one half
``gpu-check-HALF.tar.gz``. Status 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
HALVES = ("tests", "benchmarks")
HALF_SECONDS = 345.0  # with what it takes to start and to pack, six minutes
BOTH_SECONDS = 580.0  # ten minutes
TESTS_SHARE = 0.55  # of both; what they leave is the benchmarks'
LEAST_SECONDS = 15.0  # in which a check may tell something
PRETRAINING_SECONDS = 150.0  # of one run of pretraining among the tests
PROCESSES = 8
WAYS = ("pre", "peri", "fused-next")

# What people run, then what it is made of; others after them.
FIRST_TESTS = ("pretraining", "recompute", "transformer_engine", "fp8")
OWN_TESTS = "test_gpu_check.py"
MONITORED = (
    *("--num-layers", "24", "--hidden-size", "2048", "--num-attention-heads", "16", "--seq-length", "4096"),
    *("--micro-batch-size", "1", "--bf16", "--transformer-impl", "transformer_engine", "--rounds", "12"),
)


@dataclass(frozen=True)
class Check:
    """A command and its limits.

    Attributes
    ----------
    limit
        Seconds.
    memory
        Of the GPU, in GB, that it needs.
    beside
        Whether it runs beside the next one: it measures no time.
    interpreted
        Whether a rehearsal interprets Triton's kernels in it.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    memory: int = 0
    beside: bool = False
    interpreted: bool = True


def script(name: str, *arguments: str, limit: float, memory: int = 0, label: str = "") -> Check:
    """Return a check that runs a benchmark and has it write ``LABEL.json``."""
    label = label or name
    path = str(ROOT / "benchmarks" / f"{name}.py")
    return Check(label, (sys.executable, path, *arguments, "--output", f"{label}.json"), limit, memory)


def step(label: str, *arguments: str, limit: float = 150, memory: int = 0) -> Check:
    """Return a check that measures training steps."""
    return script("step", *arguments, limit=limit, memory=memory, label=f"step-{label}")


def doctor(*flags: str) -> Check:
    """Return a check of the machine, with a step of the model of the paper's 400M."""
    model = f"@{ROOT / 'examples/paper/400m.flags'}"
    command = (
        sys.executable,
        "-m",
        "megatron_periln.doctor",
        model,
        "--mock-data",
        "--timeout",
        "200",
        *flags,
    )
    return Check("doctor", command, 240, beside=True)


def tests(*paths: str, limit: float, label: str = "tests", under: tuple[str, ...] = ()) -> Check:
    """Return a check that runs pytest, ``under`` a tool if one is given, with a line a test as it ends."""
    arguments = ("-m", "pytest", "-v", "--tb", "short", "-p", "no:cacheprovider")
    return Check(label, (*under, sys.executable, *arguments, *(str(ROOT / path) for path in paths)), limit)


def gpu_tests() -> list[str]:
    """Return the files of tests/gpu, most telling first."""
    names = [f"test_{name}.py" for name in FIRST_TESTS]
    others = sorted(path.name for path in (ROOT / "tests/gpu").glob("test_*.py"))
    return [f"tests/gpu/{name}" for name in dict.fromkeys((*names, *others)) if name != OWN_TESTS]


def in_processes(check: Check, count: int) -> Check:
    """Return a check of tests that run in several processes, in the order in which they are given."""
    extra = ("--numprocesses", str(count), "--maxschedchunk", "1")
    return replace(check, command=(*check.command, *extra))


def checks_on_gpu(half: str) -> list[Check]:
    """Return what a half runs on a GPU, most telling first."""
    if half == "tests":
        return [doctor(), in_processes(tests(*gpu_tests(), limit=HALF_SECONDS), PROCESSES)]
    middle = ("--size", "1.5B", "--rounds")
    graphs = ("--variants", "pre", *(f"{way}+graphs" for way in WAYS))
    large = ("--size", "3.2B", "--micro-batch-size", "1", "--rounds", "5")
    sweep = ("--sweep", "--hidden-sizes", "2048", "4096", "8192", "--rounds", "2")
    fp8 = ("--num-microbatches", "4", "--fp8")
    checks = [
        step("1.5B-bf16", *middle, "4", "--profile", "--memory", memory=70, limit=140),
        step("1.5B-graphs", *middle, "3", *graphs, memory=70, limit=120),
        script("kernel", "--rounds", "1", limit=70),
        step("1.5B-fp8-delayed", *middle, "3", *fp8, "delayed", "--profile", memory=70, limit=100),
        script("host_time", "--device", "cuda", limit=50),
    ]
    if sanitizer := shutil.which("compute-sanitizer"):
        # Each tensor has memory of its own, or what lies beyond it would be the allocator's, and valid.
        allocation = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")
        under = (*allocation, sanitizer, "--error-exitcode", "1", "--report-api-errors", "no")
        checks.append(tests("tests/gpu/test_sanitized.py", limit=90, label="compute-sanitizer", under=under))
    return [
        *checks,
        script("kernel", *sweep, limit=120, label="kernel-sweep"),
        step("400M-bf16", "--size", "400M", "--rounds", "5", "--micro-batch-size", "4"),
        step("3.2B-bf16", *large, memory=110),
        step("3.2B-fp8-delayed", *large, "--fp8", "delayed", memory=110),
        step("1.5B-fp8-tensorwise", *middle, "3", *fp8, "tensorwise", memory=70),
        script("monitor_cost", *MONITORED, limit=150, memory=60),
    ]


def checks_on_cpu(half: str) -> list[Check]:
    """Return the same scripts at tiny sizes."""
    cpu = ("--device", "cpu")
    if half == "tests":
        run = replace(tests(*gpu_tests(), limit=HALF_SECONDS), interpreted=False)  # which the tests choose
        return [replace(doctor(*cpu), interpreted=False), in_processes(run, os.cpu_count() or 1)]
    kernel = (*cpu, "--hidden-sizes", "64", "--tokens", "64", "--rounds", "1")
    tiny = (*cpu, "--size", "tiny", "--seq-length", "32", "--rounds", "2", "--profile")
    resources = script("kernel_resources", "--hidden-sizes", "2048", limit=120)
    return [
        step("tiny", *tiny, "--variants", "pre", "peri", "peri:triton", "fused-next", "unfused", limit=120),
        script("host_time", "--turns", "1", "--rounds", "1", limit=120),
        script("kernel", *kernel, limit=120),
        tests("tests/norms/test_fused_dropout.py", limit=120, label="interpreted"),
        script("kernel", *kernel, "--sweep", limit=120, label="kernel-sweep"),
        replace(resources, interpreted=False),
        script("monitor_cost", *cpu, "--num-layers", "2", "--hidden-size", "64", "--rounds", "2", limit=120),
    ]


def unpack(wheels: Path, site: Path) -> None:
    """Put archives and wheels of a folder into ``site``, compiled: processes start in a third of the time."""
    archives, files = sorted(wheels.glob("*.tar.xz")), [str(wheel) for wheel in sorted(wheels.glob("*.whl"))]
    if not archives and not files:
        sys.exit(f"{wheels} holds no wheels and no *.tar.xz; benchmarks/gpu_wheels.txt lists what it should")
    pip = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--target",
    )
    with ThreadPoolExecutor() as pool:
        unpacked = [
            pool.submit(shutil.unpack_archive, archive, site / "archives", filter="data")
            for archive in archives
        ]
        if files:
            subprocess.run([*pip, str(site / "wheels"), *files], check=True)
        for archive in unpacked:
            archive.result()
    compile_all = (
        sys.executable,
        "-m",
        "compileall",
        "-q",
        "-j",
        "0",
        str(site),
        str(ROOT / "megatron_periln"),
    )
    subprocess.run(compile_all, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def gpu_memory(environment: dict[str, str]) -> float:
    """Return the GPU's memory in GB."""
    code = "import torch; print(torch.cuda.get_device_properties(0).total_memory / 1e9)"
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    if process.returncode:
        last = (process.stderr.splitlines() or [""])[-1]
        sys.exit(f"no GPU can be used: {last}; --rehearse runs it on the CPU")
    return float(process.stdout)


class Run:
    """A half: its checks, their results as they come, and the archive at the end.

    Parameters
    ----------
    output
        The folder for results.
    environment
        Of the checks.
    memory
        Of the GPU, in GB.
    deadline
        Of ``time.monotonic``, when it ends.
    """

    def __init__(self, output: Path, environment: dict[str, str], memory: float, deadline: float) -> None:
        self.output, self.environment, self.memory, self.deadline = output, environment, memory, deadline
        self.results: list[dict[str, object]] = []
        self.running: list[subprocess.Popen[bytes]] = []

    def all(self, checks: Iterable[Check]) -> None:
        """Run the checks, one after the other but for those that run beside the next."""
        with ThreadPoolExecutor() as pool:
            beside = []
            for check in checks:
                if check.beside:
                    beside.append(pool.submit(self.one, check))
                else:
                    self.one(check)
            for other in beside:
                other.result()

    def one(self, check: Check) -> None:
        """Run a check, and tell what came of it."""
        started = time.monotonic()
        left = min(check.limit, self.deadline - started)
        if check.memory > self.memory:
            outcome = f"skipped: needs {check.memory} GB"
        elif left < LEAST_SECONDS:
            outcome = "skipped: no time left"
        else:
            outcome = self._outcome(check, left)
        self.tell(check.name, outcome, time.monotonic() - started)

    def _outcome(self, check: Check, seconds: float) -> str:
        environment = self.environment
        if not check.interpreted:
            environment = {name: value for name, value in environment.items() if name != "TRITON_INTERPRET"}
        with (self.output / f"{check.name}.log").open("wb") as log:
            try:
                process = subprocess.Popen(
                    check.command,
                    cwd=self.output,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # to end with all that it has started
                )
            except OSError as error:
                return f"failed to start: {error}"
            self.running.append(process)
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return f"stopped after {seconds:.0f} s"
            finally:
                end_group(process)
                self.running.remove(process)
        return "passed" if code == 0 else f"failed with status {code}"

    def tell(self, name: str, outcome: str, seconds: float) -> None:
        """Print a check's line, and write it."""
        self.results.append({"check": name, "outcome": outcome, "seconds": round(seconds, 1)})
        line = f"{name:<24}{outcome:<28}{seconds:>7.1f} s"
        print(line, flush=True)
        with (self.output / "results.txt").open("a") as stream:
            stream.write(f"{line}\n")
        (self.output / "summary.json").write_text(json.dumps(self.results, indent=2) + "\n")

    def stop(self) -> None:
        """End what runs."""
        for process in list(self.running):
            end_group(process)

    def failed(self) -> list[str]:
        """Return the checks that did not pass, but for those that this GPU has no memory for."""
        fine = ("passed", "skipped: needs")
        return [
            str(result["check"]) for result in self.results if not str(result["outcome"]).startswith(fine)
        ]


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all others of it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def pack(output: Path, half: str | None) -> Path:
    """Return an archive of the output folder, but for other archives in it."""
    archive = output / (f"gpu-check-{half}.tar.gz" if half else "gpu-check.tar.gz")
    unfinished = archive.with_suffix(".unfinished")  # the one of the first half stays until there is another
    with tarfile.open(unfinished, "w:gz") as tar:
        for path in sorted(output.rglob("*")):
            if path.is_file() and path != unfinished and not path.name.endswith(".tar.gz"):
                tar.add(path, path.relative_to(output))
    return unfinished.replace(archive)


def environment_of(options: argparse.Namespace, site: Path) -> dict[str, str]:
    """Return the environment of the checks."""
    path = [str(folder) for folder in (site / "wheels", site / "archives") if folder.is_dir()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT)]), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONUNBUFFERED": "1", "MEGATRON_PERILN_TEST_IN_ORDER": "1"}
    environment["MEGATRON_PERILN_PRETRAINING_TABLE"] = str(options.output / "pretraining.txt")
    if options.preload:
        environment["LD_PRELOAD"] = str(options.preload.resolve())
    if options.rehearse:
        rehearsal = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "MEGATRON_PERILN_REHEARSE": "1"}
        return environment | rehearsal
    return environment | {"MEGATRON_PERILN_TEST_DEVICE": "cuda", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def _stop(signum: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(signum).name)


def main() -> None:
    """Run a half, or both, and tell what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--half", choices=HALVES, default=None, help="default: both, one after the other")
    parser.add_argument("--wheels", type=Path, default=None, help="a folder; default: use what is installed")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--preload", type=Path, default=None, help="a library, for LD_PRELOAD")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU")
    parser.add_argument(
        "--seconds",
        type=float,
        default=None,
        help=f"in all; default: {HALF_SECONDS:g} of a half, {BOTH_SECONDS:g} of both; each check's limit "
        "grows with it, for a machine that does other things too",
    )
    parser.add_argument("--only", nargs="+", default=None, help="names of checks")
    options = parser.parse_args()
    default = HALF_SECONDS if options.half else BOTH_SECONDS
    seconds = options.seconds or default
    slower = max(1.0, seconds / default)
    started = time.monotonic()
    options.output = output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _stop)
    run = Run(output, {}, 0.0, started + seconds)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if options.wheels:
                unpack(options.wheels, Path(folder))
            run.environment = environment_of(options, Path(folder))
            run.environment["MEGATRON_PERILN_PRETRAINING_SECONDS"] = f"{PRETRAINING_SECONDS * slower:g}"
            if not options.rehearse:
                run.memory = gpu_memory(run.environment)
            for half in [options.half] if options.half else HALVES:
                is_first = half == HALVES[0] and options.half is None
                run.deadline = started + seconds * (TESTS_SHARE if is_first else 1)
                checks = (checks_on_cpu if options.rehearse else checks_on_gpu)(half)
                run.all(
                    replace(check, limit=check.limit * slower)
                    for check in checks
                    if not options.only or check.name in options.only
                )
                if is_first:  # all of it may be ended without a warning
                    pack(output, None)
        except KeyboardInterrupt as error:
            run.stop()
            run.tell("gpu-check", f"stopped by {error or 'hand'}", 0.0)
        finally:
            print(f"results: {pack(output, options.half)}", flush=True)
    if failed := run.failed():
        sys.exit(f"not all checks passed ({', '.join(failed)}); their logs are in {output}")


if __name__ == "__main__":
    main()
