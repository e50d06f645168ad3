"""Megatron's flags under ``--device cpu``."""

from __future__ import annotations

from argparse import Namespace

from megatron_periln.rules import Rule

__all__ = ["COUNTERPARTS", "GPU_ONLY", "adapt_arguments"]

COUNTERPARTS: tuple[tuple[str, object, str], ...] = (
    ("distributed_backend", "gloo", "NCCL needs a GPU"),
    ("transformer_impl", "local", "Transformer Engine needs a GPU"),
    ("no_persist_layer_norm", True, "the persistent LayerNorm kernel needs a GPU"),
    ("gradient_accumulation_fusion", False, "it is a CUDA kernel"),
    ("masked_softmax_fusion", False, "it is a CUDA kernel"),
    ("apply_rope_fusion", False, "it is a CUDA kernel"),
    ("moe_permute_fusion", False, "it is a Triton kernel"),
    ("moe_router_fusion", False, "it is a CUDA kernel"),
    ("cuda_graph_impl", "none", "there are no CUDA graphs"),
    ("tp_comm_overlap", False, "it needs Transformer Engine"),
    ("te_rng_tracker", False, "it needs Transformer Engine"),
    ("deterministic_mode", False, "the CPU is deterministic, and its indexing sums bf16 gradients in bf16"),
)
"""What has a counterpart on the CPU that computes the same: argument, value there, reason."""


def _without(flag: str, advice: str, name: str | None = None, without: object = None) -> Rule:
    name = name or flag.removeprefix("--").replace("-", "_")
    return Rule(
        lambda args: getattr(args, name, None),
        f"{flag} needs a GPU and has no counterpart under --device cpu; {advice}",
        {name: without},
    )


GPU_ONLY: tuple[Rule, ...] = (
    _without("--fp8-format", "use --bf16, or no precision flag for fp32", "fp8"),
    _without("--fp4-format", "use --bf16, or no precision flag for fp32", "fp4"),
    _without("--use-megatron-fsdp", "use --use-distributed-optimizer", without=False),
    _without("--use-torch-fsdp2", "use --use-distributed-optimizer", without=False),
    _without("--dataloader-inter-document-masking", "use --reset-attention-mask", without=False),
    _without("--moe-latent-size", "drop it: its projections are Transformer Engine's"),
    _without("--experimental-attention-variant", "drop it: its layers are Transformer Engine's"),
)
"""What has no counterpart on the CPU."""


def adapt_arguments(args: Namespace) -> list[str]:
    """Set what needs a GPU to what computes the same on the CPU.

    Parameters
    ----------
    args
        Megatron's parsed arguments, before their validation; changed in place.

    Returns
    -------
    list of str
        One line for each argument that was changed.
    """
    changes = []
    if getattr(args, "async_save", False) and args.async_strategy == "nvrx":
        args.async_strategy = "mcore"
        changes.append("async_strategy nvrx -> mcore (nvidia-resiliency-ext's writer hangs without a GPU)")
    for name, value, reason in COUNTERPARTS:
        asked = getattr(args, name, value)
        if asked != value:
            setattr(args, name, value)
            changes.append(f"{name} {asked} -> {value} ({reason})")
    return changes
