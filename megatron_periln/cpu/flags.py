"""Megatron's flags under ``--device cpu``: what is turned off, and what has no counterpart there."""

from __future__ import annotations

import enum
from argparse import Namespace
from collections.abc import Iterator, Mapping

from megatron_periln.rules import Check, Rule

__all__ = [
    "COUNTERPARTS",
    "GPU_ONLY",
    "LOW_PRECISION",
    "REPLACED",
    "adapt_arguments",
    "low_precision",
    "without_low_precision",
]

_OFF: dict[str, Mapping[str, object]] = {
    "Transformer Engine needs a GPU": {
        "transformer_impl": "local",
        "tp_comm_overlap": False,
        "te_rng_tracker": False,
        "use_te_activation_func": False,
        "use_transformer_engine_op_fuser": False,
        "fused_residual_rmsnorm": False,
        "mla_down_proj_fusion": False,
        "delay_wgrad_compute": False,
        "overlap_dispatch_backward_with_experts_wgrad": False,
        "use_grouped_gemm_for_dense_mlp": False,
        "use_grouped_gemm_for_shared_expert": False,
        "moe_single_grouped_weight": False,
        "moe_single_grouped_bias": False,
        "flash_attention_version": None,
        "log_max_attention_logit": False,
    },
    "it is a CUDA kernel": {
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "moe_router_fusion": False,
        "batch_invariant_mode": False,
    },
    "it needs --gradient-accumulation-fusion, a CUDA kernel": {
        "defer_embedding_wgrad_compute": False,
        "wgrad_deferral_limit": 0,
    },
    "it is a Triton kernel": {"moe_permute_fusion": False},
    "the persistent LayerNorm kernel needs a GPU": {"no_persist_layer_norm": True},
    "there are no CUDA graphs": {
        "cuda_graph_impl": "none",
        "enable_cuda_graph": False,
        "external_cuda_graph": False,
        "optimizer_cuda_graph": False,
        "cuda_graph_modules": [],
        "cuda_graph_scope_deprecated": None,
        "inference_cuda_graph_scope": None,
    },
    "the memory is the CPU's already": {
        "fine_grained_activation_offloading": False,
        "offload_modules": [],
        "delay_offload_until_cuda_graph": False,
        "cpu_offloading_num_layers": 0,
        "optimizer_cpu_offload": False,
        "use_torch_optimizer_for_cpu_offload": False,
        "overlap_cpu_optimizer_d2h_h2d": False,
        "moe_paged_stash": False,
    },
    "its optimizer is Transformer Engine's; states stay in fp32": {
        "use_precision_aware_optimizer": False,
        "main_grads_dtype": "fp32",
        "main_params_dtype": "fp32",
        "exp_avg_dtype": "fp32",
        "exp_avg_sq_dtype": "fp32",
    },
    "NCCL needs a GPU": {
        "distributed_backend": "gloo",
        "nccl_ub": False,
        "disable_symmetric_registration": False,
        "fsdp_manual_registration": False,
        "use_sharp": False,
        "sharp_enabled_group": None,
        "nccl_communicator_config_path": None,
        "symmetric_ar_type": None,
        "pipeline_model_parallel_comm_backend": None,
        "use_ring_exchange_p2p": False,
    },
    "there are no streams and no memory of a GPU": {
        "high_priority_stream_groups": [],
        "high_priority_a2a_comm_stream": False,
        "gpu_sniff_test_interval": None,
        "record_memory_history": False,
    },
    "the alltoall dispatcher takes the place of DeepEP, HybridEP and NCCL EP": {
        "moe_enable_deepep": False,
        "moe_flex_dispatcher_backend": "deepep",
        "moe_permute_fusion_into_hybridep": False,
        "moe_hybridep_pad_uneven_dispatch_inputs": False,
        "moe_ncclep_static_shape": False,
        "moe_ncclep_zero_copy": False,
        "moe_flex_dispatcher_num_sms": None,
        "moe_deepep_num_sms": None,
        "moe_hybridep_num_sms": None,
        "moe_hybridep_num_blocks_permute": None,
        "moe_hybridep_num_blocks_unpermute": None,
    },
    "the CPU is deterministic, and its indexing sums bf16 gradients in bf16": {"deterministic_mode": False},
    "the distributed optimizer shards what it can": {
        "use_megatron_fsdp": False,
        "use_torch_fsdp2": False,
        "init_model_with_meta_device": False,
    },
}

COUNTERPARTS: tuple[tuple[str, object, str], ...] = tuple(
    (name, value, reason) for reason, values in _OFF.items() for name, value in values.items()
)
"""What has a counterpart on the CPU that computes the same: argument, value there, reason."""

REPLACED: tuple[tuple[str, tuple[str, ...], object, str], ...] = (
    ("moe_token_dispatcher_type", ("flex",), "alltoall", "DeepEP and HybridEP need a GPU"),
    ("cross_entropy_fusion_impl", ("te",), "native", "Transformer Engine needs a GPU"),
    ("ckpt_format", ("fsdp_dtensor", "torch_dcp"), "torch_dist", "it is that of FSDP"),
)
"""The same for arguments of which other values stay: argument, values that change, value there, reason."""

# Transformer Engine's.
_BACKENDS = {"flash", "fused", "unfused"}

LOW_PRECISION: dict[str, tuple[str, object]] = {
    "fp8": ("--fp8-format", None),
    "fp4": ("--fp4-format", None),
    "fp8_param_gather": ("--fp8-param-gather", False),
    "fp4_param_gather": ("--fp4-param-gather", False),
    "moe_router_padding_for_fp8": ("--moe-router-padding-for-fp8", False),
    "moe_router_padding_for_quantization": ("--moe-router-padding-for-quantization", False),
    "reuse_grad_buf_for_mxfp8_param_ag": ("--reuse-grad-buf-for-mxfp8-param-ag", False),
    "fp8_output_proj": ("--fp8-output-proj", False),
    "first_last_layers_bf16": ("--first-last-layers-bf16", False),
    "keep_fp8_transpose_cache": ("--keep-fp8-transpose-cache", False),
    "te_precision_config_file": ("--te-precision-config-file", None),
    "fp8_quantizer_factory": ("--fp8-quantizer-factory", None),
    "fp4_quantizer_factory": ("--fp4-quantizer-factory", None),
    "fp8_recipe": ("--fp8-recipe", "delayed"),
    "fp4_recipe": ("--fp4-recipe", "nvfp4"),
}
"""FP8 and FP4, and what goes with them: by argument, the flag and the value without."""


def low_precision(args: Namespace) -> list[str]:
    """Return the flags of `LOW_PRECISION` that are given."""
    return [
        flag for name, (flag, without) in LOW_PRECISION.items() if getattr(args, name, without) != without
    ]


def without_low_precision(args: Namespace) -> list[str]:
    """Have a run without FP8 and FP4, in bf16 unless fp16 is asked for; return one line if that changes it.

    Parameters
    ----------
    args
        Megatron's parsed arguments, before their validation; changed in place.
    """
    given = low_precision(args)
    vars(args).update({name: without for name, (_, without) in LOW_PRECISION.items() if hasattr(args, name)})
    if not given:
        return []
    args.bf16 = not args.fp16
    return [f"--without-fp8: trains in {'bf16' if args.bf16 else 'fp16'}, without {', '.join(given)}"]


def _needs_low_precision(args: Namespace) -> Iterator[str]:
    if set(given := low_precision(args)) - {"--fp8-recipe", "--fp4-recipe"}:  # idle by themselves
        without_low_precision(args)
        yield (
            f"{', '.join(given)}: FP8 and FP4 need a GPU and have no counterpart under --device cpu; drop "
            f"{'it' if len(given) == 1 else 'them'}, or give --without-fp8 to train in bf16"
        )


def _hybrid_layers(args: Namespace) -> Iterator[str]:
    pattern = getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None)
    if found := sorted(set(pattern or "") & {"D"}):
        yield (
            f"--hybrid-layer-pattern {pattern!r}: layers {', '.join(found)} need a GPU and have no "
            "counterpart under --device cpu; use layers *, +, -, E, M and G"
        )


def _without(flag: str, advice: str, name: str | None = None, without: object = None) -> Rule:
    name = name or flag.removeprefix("--").replace("-", "_")
    return Rule(
        lambda args: getattr(args, name, None),
        f"{flag} needs a GPU and has no counterpart under --device cpu; {advice}",
        {name: without},
    )


GPU_ONLY: tuple[Check, ...] = (
    _needs_low_precision,
    _hybrid_layers,
    _without("--dataloader-inter-document-masking", "use --reset-attention-mask", without=False),
    _without("--moe-latent-size", "drop it: its projections are Transformer Engine's"),
    _without("--experimental-attention-variant", "drop it: its layers are Transformer Engine's"),
    _without("--qk-clip", "drop it: its attention is Transformer Engine's", without=False),
    _without(
        "--moe-expert-rank-capacity-factor", "use --moe-expert-capacity-factor, or drop it to drop no token"
    ),
    _without("--moe-mlp-glu-interleave-size", "drop it: it lays weights out for a kernel of a GPU"),
    _without("--moe-shared-expert-glu-interleave-size", "drop it: it lays weights out for a kernel of a GPU"),
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
        One line for each argument that was changed, which starts with its name.
    """
    changes = []
    if getattr(args, "use_megatron_fsdp", False) or getattr(args, "use_torch_fsdp2", False):
        args.use_distributed_optimizer = True
        changes.append(
            "use_distributed_optimizer -> True (in the place of FSDP, and its checkpoints' format)"
        )
    # Without a persistent worker Megatron saves synchronously, which `idle_flags` tells.
    saves = getattr(args, "async_save", False) and args.use_persistent_ckpt_worker
    if saves and args.async_strategy == "nvrx":
        args.async_strategy = "mcore"
        changes.append("async_strategy nvrx -> mcore (nvidia-resiliency-ext's writer hangs without a GPU)")
    for name, value, reason in COUNTERPARTS:
        asked = getattr(args, name, value)
        if asked != value:
            setattr(args, name, value)
            changes.append(f"{name} {_shown(asked)} -> {value} ({reason})")
    for name, values, value, reason in REPLACED:
        asked = getattr(args, name, value)
        if asked in values:
            setattr(args, name, value)
            changes.append(f"{name} {asked} -> {value} ({reason})")
    backend = getattr(args, "attention_backend", None)
    if isinstance(backend, enum.Enum) and backend.name in _BACKENDS:
        args.attention_backend = type(backend)["auto"]  # which Megatron defines, and this is read before it
        changes.append(f"attention_backend {backend.name} -> auto (attention is that of local layers)")
    return changes


def _shown(value: object) -> object:
    if isinstance(value, list):
        return ",".join(str(_shown(each)) for each in value)
    return value.name if isinstance(value, enum.Enum) else value
