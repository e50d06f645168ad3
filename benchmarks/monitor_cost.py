"""What the monitor costs: step time relative to training without it, measured side by side in one run.

Whole training steps (Megatron's schedule, gradient reduction and Adam) of one GPT in one process.
Steps without a monitor, steps between two intervals, steps that record the layers in the monitor's file,
and steps that write them to TensorBoard too take turns, so that they share whatever the machine is doing.
A run at interval N takes N - 1 steps of the second kind and one of a recording kind. Of each the time by the
clock and the CPU time of all threads, TensorBoard's until its event is in its file. Prints a table and
writes JSON.

    python benchmarks/monitor_cost.py --device cpu
    python benchmarks/monitor_cost.py --hidden-size 2048 --num-layers 24 --seq-length 4096 --bf16
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import command, machine
from one_process import build_gpt, start_megatron

INTERVALS = (1, 10, 100)
FILE, TENSORBOARD = "file", "file and TensorBoard"


def build(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return a GPT wrapped for data parallelism, and its optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    dtype = torch.bfloat16 if options.bf16 else torch.float32
    model = build_gpt(options, options.norm_placement)
    transformer = model.config
    transformer.finalize_model_grads_func = finalize_model_grads
    if options.bf16:
        model = Float16Module(transformer, model)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    model = DistributedDataParallel(transformer, ddp, model)
    adam = OptimizerConfig(
        optimizer="adam", lr=1e-4, bf16=options.bf16, params_dtype=dtype, use_distributed_optimizer=True
    )
    return model, get_megatron_optimizer(adam, [model])


def build_monitor(options: argparse.Namespace, folder: str) -> Any:
    """Return a monitor whose interval the caller decides."""
    from megatron.training import global_vars
    from torch.utils.tensorboard import SummaryWriter

    from megatron_periln.monitor.install import RunMonitor

    global_vars._GLOBAL_TENSORBOARD_WRITER = SummaryWriter(f"{folder}/tensorboard", max_queue=1000)
    arguments = {
        "rank": 0,
        "world_size": 1,
        "iteration": 0,
        "monitor_interval": 1,
        "monitor_layers": "all",
        "monitor_file": f"{folder}/monitor.jsonl",
        "monitor_stop_on": None,
        "train_iters": None,
        "output_norm_init": "ones",
        "hybrid_layer_pattern": None,
        "fp16": False,
        "loss_scale": None,
    }
    return RunMonitor(argparse.Namespace(**{**vars(options), **arguments}))


class Taken(NamedTuple):
    """What a step took, in seconds."""

    clock: float
    cpu: float


def steps(options: argparse.Namespace, monitor: Any) -> dict[str, Callable[[int], Taken]]:
    """Return the kinds of training steps; each takes the iteration and returns what it took."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.training import global_vars

    writer = global_vars.get_tensorboard_writer()
    model, optimizer = build(options)
    shape = (options.micro_batch_size, options.seq_length)
    tokens = torch.randint(0, options.vocab_size, shape, device="cuda")
    positions = torch.arange(options.seq_length, device="cuda").expand(shape)

    def summed(losses: torch.Tensor) -> Any:
        total, count = losses.float().sum(), torch.tensor(losses.numel(), dtype=torch.int, device="cuda")
        return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

    def forward(_: Any, module: Any) -> Any:
        return module(tokens, positions, None, labels=tokens), summed

    def schedule(**arguments: Any) -> Any:
        return get_forward_backward_func()(**arguments)

    def step(iteration: int, *, monitored: bool, recorded: bool, tensorboard: bool = False) -> Taken:
        global_vars._GLOBAL_TENSORBOARD_WRITER = writer if tensorboard else None
        torch.cuda.synchronize()
        start = Taken(time.perf_counter(), time.process_time())
        run = schedule
        if monitored:
            monitor.is_due = lambda _: recorded
            run = monitor.begin(iteration, schedule, [model], optimizer)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = run(
            forward_step_func=forward,
            data_iterator=iter(()),
            model=[model],
            num_microbatches=options.num_microbatches,
            seq_length=options.seq_length,
            micro_batch_size=options.micro_batch_size,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        optimizer.get_loss_scale().item()  # as Megatron's loop does in every iteration
        if monitored:
            total = sum(microbatch["lm loss"] for microbatch in losses)
            monitor.end(iteration, {"lm loss": total[0] / total[1]}, norm, 1e-4)
        torch.cuda.synchronize()
        if tensorboard:
            writer.flush()  # what its thread does is of this step
        return Taken(time.perf_counter() - start.clock, time.process_time() - start.cpu)

    return {
        "no monitor": lambda i: step(i, monitored=False, recorded=False),
        "between intervals": lambda i: step(i, monitored=True, recorded=False),
        FILE: lambda i: step(i, monitored=True, recorded=True),
        TENSORBOARD: lambda i: step(i, monitored=True, recorded=True, tensorboard=True),
    }


def quartiles(mine: list[Taken], others: list[Taken], what: str) -> list[float]:
    """Return those of the ratios of steps of the same turn, by the clock or the CPU."""
    ratios = [getattr(one, what) / getattr(other, what) for one, other in zip(mine, others, strict=True)]
    return statistics.quantiles(ratios, n=4)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--transformer-impl", choices=("local", "transformer_engine"), default="local")
    parser.add_argument("--norm-placement", default="peri")
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-attention-heads", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--num-microbatches", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=None, help="a JSON file")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    start_megatron(options.device, options.micro_batch_size, options.num_microbatches)
    from megatron.training.global_vars import get_tensorboard_writer

    with tempfile.TemporaryDirectory() as folder:
        monitor = build_monitor(options, folder)
        writer = get_tensorboard_writer()
        kinds = steps(options, monitor)
        taken: dict[str, list[Taken]] = {name: [] for name in kinds}
        for turn in range(options.rounds + 3):
            for place, (name, step) in enumerate(kinds.items()):
                seconds = step(1 + turn * len(kinds) + place)
                if turn >= 3:
                    taken[name].append(seconds)
        monitor.close()
        writer.close()  # whose thread would write where there is no folder any more

    results = [
        {
            "step": name,
            "ms": 1e3 * statistics.median(step.clock for step in mine),
            "cpu_ms": 1e3 * statistics.median(step.cpu for step in mine),
            "over_none": quartiles(mine, taken["no monitor"], "clock"),
            "cpu_over_none": quartiles(mine, taken["no monitor"], "cpu"),
            "cpu_over_file": quartiles(mine, taken[FILE], "cpu"),
        }
        for name, mine in taken.items()
    ]
    of = {row["step"]: row for row in results}
    between = of["between intervals"]["over_none"][1]
    at_intervals = {
        name: {n: ((n - 1) * between + of[name]["over_none"][1]) / n for n in INTERVALS}
        for name in (FILE, TENSORBOARD)
    }
    columns = {"ms": 9, "over none": 11, "quartiles": 18, "CPU ms": 9, "CPU over none": 15, "over file": 11}
    print(f"{'step':<22}" + "".join(f"{column:>{width}}" for column, width in columns.items()))
    for row in results:
        low, middle, high = row["over_none"]
        print(
            f"{row['step']:<22}{row['ms']:>9.1f}{middle:>11.4f}{f'{low:.3f} .. {high:.3f}':>18}"
            f"{row['cpu_ms']:>9.1f}{row['cpu_over_none'][1]:>15.4f}{row['cpu_over_file'][1]:>11.4f}"
        )
    for name, ratios in at_intervals.items():
        for interval, ratio in ratios.items():
            print(f"{f'{name}, interval {interval}':<31}{ratio:>11.4f}")
    if options.output:
        report = {
            "device": machine(),
            "command": command(),
            "settings": {key: str(value) for key, value in vars(options).items()},
            "results": results,
            "over_none_at_interval": at_intervals,
        }
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
