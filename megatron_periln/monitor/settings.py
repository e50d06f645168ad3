"""The settings of the monitor: its flags, and the layers that they choose."""

from __future__ import annotations

import os
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path

from megatron_periln.errors import UsageError
from megatron_periln.monitor.alerts import STOPS
from megatron_periln.monitor.lines import FILE_NAME

__all__ = ["GROUP", "add_monitor_arguments", "check_monitor", "chosen_layers"]

GROUP = "monitor"

# Flags under which hooks on layers don't see each token once, or gradients are kept elsewhere.
_BLIND = {
    "use_megatron_fsdp": "--use-megatron-fsdp",
    "use_torch_fsdp2": "--use-torch-fsdp2",
    "overlap_moe_expert_parallel_comm": "--overlap-moe-expert-parallel-comm",
    "fine_grained_activation_offloading": "--fine-grained-activation-offloading",
}


def add_monitor_arguments(parser: ArgumentParser) -> None:
    """Add the monitor's group of flags."""
    group = parser.add_argument_group(title=GROUP)
    # Not --monitor: torchrun takes that for a short form of its own --monitor-interval.
    group.add_argument(
        "--monitor-layers",
        default=None,
        help="record statistics while training of layers all, every:K, or such as 0,1,12; default: off",
    )
    group.add_argument(
        "--monitor-interval",
        metavar="N",
        type=int,
        default=100,
        help="iterations between records of layers; default: 100",
    )
    group.add_argument(
        "--monitor-file", metavar="FILE", default=None, help=f"default: {FILE_NAME} in the folder of --save"
    )
    group.add_argument(
        "--monitor-stop-on", choices=tuple(STOPS), default=None, help="save a checkpoint and stop there"
    )


def check_monitor(args: Namespace) -> None:
    """Check the monitor's flags, validated otherwise, and name its file.

    Raises
    ------
    UsageError
        For a flag that is wrong, or one of Megatron's under which the monitor would be blind.
    """
    if not args.monitor_layers:
        for name in ("monitor_file", "monitor_stop_on"):
            if getattr(args, name) is not None:
                raise UsageError(
                    f"--{name.replace('_', '-')} does nothing without --monitor-layers; give it too"
                )
        return
    if args.monitor_interval < 1:
        raise UsageError(f"--monitor-interval must be positive, not {args.monitor_interval}")
    if args.num_layers is not None:
        chosen_layers(args.monitor_layers, args.num_layers)
    for name, flag in _BLIND.items():
        if getattr(args, name, False):
            raise UsageError(f"--monitor-layers does not see layers under {flag}; drop one of them")
    if reason := _why_no_step_without_graphs(args):
        raise UsageError(f"--monitor-layers {reason}; drop it or --cuda-graph-impl")
    if getattr(args, "gtp_weight_remat_size", 1) > 1:
        raise UsageError("--monitor-layers does not know --gtp-weight-remat-size; drop one of them")
    if args.monitor_stop_on is not None and args.save is None:
        raise UsageError("--monitor-stop-on saves a checkpoint: give --save")
    if args.monitor_stop_on == "nan" and args.check_for_nan_in_loss_and_grad:
        raise UsageError(
            "--monitor-stop-on nan comes too late where Megatron ends the run itself, without a checkpoint; "
            "give --no-check-for-nan-in-loss-and-grad too"
        )
    if args.monitor_file is None:
        if args.save is None:
            raise UsageError("--monitor-layers has no file to write to: give --monitor-file or --save")
        args.monitor_file = str(Path(args.save) / FILE_NAME)
    _check_file(Path(args.monitor_file))


def _why_no_step_without_graphs(args: Namespace) -> str | None:
    """Return why a step can't run without its CUDA graphs, so that layers are seen; None if it can."""
    graphs = getattr(args, "cuda_graph_impl", "none")
    if graphs == "none":
        return None
    if graphs == "full_iteration":
        return "does not see layers where the whole step is one CUDA graph"
    if getattr(args, "fp8", None) or getattr(args, "fp4", None):
        return "needs steps without CUDA graphs, which hold the scales of FP8 and FP4"
    if graphs == "local" and args.num_experts and args.cuda_graph_modules:
        return "does not see layers of which Megatron's own CUDA graphs hold parts"
    return None


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"--monitor-file {path} is a folder; give a file in it")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    writable = path if path.exists() else folder
    if not folder.is_dir() or not os.access(writable, os.W_OK):
        raise UsageError(f"--monitor-file {path}: {writable} is not writable; give another file")


def chosen_layers(choice: str, num_layers: int) -> list[int]:
    """Return the numbers of the monitored layers, in order.

    Parameters
    ----------
    choice
        ``"all"``; ``"every:K"`` for layers ``K, 2K, ...`` and both ends; or numbers such as
        ``"0,1,12"``.
    num_layers
        ``L``. Layer 0 is the embedding's output, ``L + 1`` the final norm's.

    Raises
    ------
    UsageError
        If it is none of these, or names a layer that is not there.
    """
    last = num_layers + 1
    if choice == "all":
        return list(range(last + 1))
    if match := re.fullmatch(r"every:([1-9]\d*)", choice):
        return sorted({*range(0, last, int(match[1])), last})
    if not re.fullmatch(r"\d+(,\d+)*", choice):
        raise UsageError(
            f"--monitor-layers {choice} is none of all, every:K, and a list of numbers such as 0,1,12"
        )
    layers = sorted({int(number) for number in choice.split(",")})
    if layers[-1] > last:
        raise UsageError(
            f"--monitor-layers {choice}: there is no layer {layers[-1]}; "
            f"they are 0 (the embedding) to {last} (the final norm)"
        )
    return layers
