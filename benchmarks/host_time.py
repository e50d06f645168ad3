"""What one call of the norm kernels costs the host, forward and backward, beside Megatron's compiled add.

The host must queue kernels faster than the GPU runs them. Calls of one kind follow one another as a model's
layers do, each with inputs of its own, and then go backward together; the time of the fastest such chain is
divided by its length. Megatron's add, the kernels of this checkout and of others (``--base``) take turns.

    python benchmarks/host_time.py                              # no GPU: a driver that launches nothing
    python benchmarks/host_time.py --base ../e580f41 --output host_time.json
    python benchmarks/host_time.py --device cuda                # with Transformer Engine, if installed

Without a GPU (driver_stand_in.py) times leave out what the CUDA driver takes for a launch, the same for all;
that memory comes from the CPU's allocator; that Inductor launches Megatron's add as a Triton kernel on a GPU,
here as a C++ one, which is cheaper; and the device that older checkouts make current around a call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LENGTH, HIDDEN_SIZE, EPS = 40, 64, 1e-5
Step = Callable[..., Any]
"""From sublayer output, residual, weight and bias ``[hidden]`` to the sum, or that and its norm."""


def _contestants(device: str) -> dict[str, Step]:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    from megatron_periln.norms import kernels

    add = get_bias_dropout_add(True, True)
    last = (EPS, False, 0.0, True)
    contestants: dict[str, Step] = {
        "Megatron's add": lambda x, r, w, b: add((x, None), r, 0.0),
        "Megatron's add, bias": lambda x, r, w, b: add((x, b), r, 0.0),
        "norm_add": lambda x, r, w, b: kernels.norm_add(x, None, r, w, None, *last),
        "norm_add, LayerNorm, bias": lambda x, r, w, b: kernels.norm_add(x, b, r, w, w, *last),
        "norm_add, dropout": lambda x, r, w, b: kernels.norm_add(x, None, r, w, None, EPS, False, 0.1, True),
        "norm_add, learned scales": _learned(device),
        "norm_add_norm": lambda x, r, w, b: kernels.norm_add_norm(
            x, None, r, w, None, *last, b, None, EPS, x.dtype
        ),
    }
    if device == "cuda":
        contestants |= _transformer_engine(add)
    return contestants


def _learned(device: str) -> Step:
    """Return `kernels.norm_add` with two learned scales, the same in all calls of a chain."""
    import torch

    from megatron_periln.norms import kernels

    scales = [torch.ones(1, dtype=torch.bfloat16, device=device).requires_grad_() for _ in range(2)]
    return lambda x, r, w, b: kernels.norm_add(x, None, r, w, None, EPS, False, 0.0, True, *scales)


def _transformer_engine(add: Step) -> dict[str, Step]:
    from kernel_contestants import _has, _transformer_engine_norm

    if not _has("transformer_engine"):
        return {}
    norm = _transformer_engine_norm(HIDDEN_SIZE)
    return {"Transformer Engine, then add": lambda x, r, w, b: add((norm(x, w), None), r, 0.0)}


def _seconds(step: Step, device: str) -> tuple[float, float]:
    """Return the seconds that a call takes in the forward and in the backward pass."""
    import torch

    def leaves(*shape: int) -> list[Any]:
        tensors = [torch.ones(shape, dtype=torch.bfloat16, device=device) for _ in range(LENGTH)]
        return [tensor.requires_grad_() for tensor in tensors]

    xs, weights, biases = leaves(1, 1, HIDDEN_SIZE), leaves(HIDDEN_SIZE), leaves(HIDDEN_SIZE)
    stream = leaves(1, 1, HIDDEN_SIZE)[0]
    normed: list[Any] = []
    _wait(device)
    start = time.perf_counter()
    for inputs in zip(xs, weights, biases, strict=True):
        result = step(inputs[0], stream, *inputs[1:])
        if isinstance(result, tuple):
            stream, norm = result
            normed.append(norm)
        else:
            stream = result
    middle = time.perf_counter()
    _wait(device)
    outs = [stream, *normed]
    grads = [out.detach() for out in outs]
    before = time.perf_counter()
    torch.autograd.grad(outs, [*xs, *weights, *biases], grads, allow_unused=True)
    end = time.perf_counter()
    _wait(device)
    return (middle - start) / LENGTH, (end - before) / LENGTH


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def work(device: str, rounds: int) -> None:
    """Measure a turn for each line read; print the least ``[forward, backward]`` in µs, by contestant."""
    import torch

    if device == "cpu":
        import driver_stand_in

        from megatron_periln.norms.kernels import backends

        with tempfile.TemporaryDirectory() as folder:
            driver_stand_in.install(Path(folder))
        for name in ("_why_not_triton", "_triton_obstacle"):  # now, and in older checkouts
            setattr(backends, name, lambda *_: None)
    from megatron_periln.norms import kernels

    kernels.use_backend("triton")
    contestants = _contestants(device)
    for step in contestants.values():
        for _ in range(3):
            _seconds(step, device)
    print(json.dumps({"torch": torch.__version__, "contestants": list(contestants)}), flush=True)
    for _ in sys.stdin:
        turn = {}
        for name, step in contestants.items():
            pairs = [_seconds(step, device) for _ in range(rounds)]
            turn[name] = [1e6 * min(times) for times in zip(*pairs, strict=True)]
        print(json.dumps(turn), flush=True)


class Worker:
    """A process that measures a checkout, and waits between its turns."""

    def __init__(self, checkout: Path, options: argparse.Namespace) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--work", "--device", options.device]
        command += ["--rounds", str(options.rounds)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.start = self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("a checkout can't be measured, see above")
        return json.loads(line)

    def turn(self) -> dict[str, list[float]]:
        """Measure once."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def summarize(turns: dict[str, list[dict[str, list[float]]]]) -> list[dict[str, Any]]:
    """Return a row a contestant and checkout, with ratios to Megatron's add and to the first checkout."""
    rows = []
    for checkout, taken in turns.items():
        for name in taken[0]:
            forward, backward = (min(turn[name][i] for turn in taken) for i in (0, 1))
            rows.append(
                {
                    "checkout": checkout,
                    "contestant": name,
                    "forward_us": forward,
                    "backward_us": backward,
                    "pair_us": forward + backward,
                    "median_us": statistics.median(sum(turn[name]) for turn in taken),
                    "turns_us": [turn[name] for turn in taken],
                }
            )
    pair = {(row["checkout"], row["contestant"]): row["pair_us"] for row in rows}
    own = next(iter(turns))
    for row in rows:
        row["over_add"] = row["pair_us"] / pair[own, "Megatron's add"]
        row["over_own"] = row["pair_us"] / pair[own, row["contestant"]]
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print a line a row."""
    heads = f"{'forward':>9}{'backward':>10}{'pair':>8}{'over add':>10}{'over ours':>11}"
    print(f"{'checkout':<14}{'contestant':<30}{heads}   µs a call")
    for row in rows:
        print(
            f"{row['checkout']:<14}{row['contestant']:<30}{row['forward_us']:>9.1f}{row['backward_us']:>10.1f}"
            f"{row['pair_us']:>8.1f}{row['over_add']:>10.2f}{row['over_own']:>11.2f}"
        )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--base", type=Path, nargs="+", default=[], help="other checkouts, to compare with")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20, help="chains a turn")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.device, options.rounds)
        return
    from machine import command, machine

    report: dict[str, Any] = {"device": machine(), "command": command()}
    checkouts = {"this": ROOT} | {path.name: path.resolve() for path in options.base}
    workers = {name: Worker(path, options) for name, path in checkouts.items()}
    turns: dict[str, list[dict[str, list[float]]]] = {name: [] for name in workers}
    for _ in range(options.turns):
        for name, worker in workers.items():
            turns[name].append(worker.turn())
    for worker in workers.values():
        worker.end()
    rows = summarize(turns)
    print_table(rows)
    if options.output:
        report |= {"calls_in_a_chain": LENGTH, "results": rows}
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
