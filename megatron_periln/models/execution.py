"""How a model is run, as opposed to what it computes: what one process sets, and what it can't run.

tests/models/test_one_process.py has a proof for each setting that the model stays the same.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

from megatron.core.transformer.enums import AttnBackend

from megatron_periln.errors import UsageError

__all__ = ["EXECUTION", "arguments_of_one_process", "refuse_other_computation"]

EXECUTION: dict[str, Any] = {
    # Where each part of the model is: one process has all of it.
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "hierarchical_context_parallel_sizes": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "overlap_p2p_comm": False,
    "tp_comm_overlap": False,
    "moe_token_dispatcher_type": "allgather",
    "moe_flex_dispatcher_backend": "deepep",
    "moe_enable_deepep": False,
    "moe_shared_expert_overlap": False,
    "overlap_moe_expert_parallel_comm": False,
    # Which kernels compute it. The fusion of the activation is not among them: without it, Megatron clamps
    # what SwiGLU's fused kernel does not, and GELU is the exact one instead of the approximation by tanh.
    "transformer_impl": "local",
    "attention_backend": AttnBackend.auto,
    "use_transformer_engine_op_fuser": False,
    "use_te_activation_func": False,
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "bias_dropout_fusion": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "cuda_graph_impl": "none",
    "te_rng_tracker": False,
    # How exactly: in fp32, or as `megatron_config` is told.
    "fp16": False,
    "bf16": False,
    "fp8": None,
    "fp8_param_gather": False,
    "fp4": None,
    "fp4_param_gather": False,
    "te_precision_config_file": None,
    "moe_router_padding_for_quantization": False,
    "fp32_residual_connection": False,
    # What is kept for the backward pass.
    "cpu_offloading": False,
    "fine_grained_activation_offloading": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "recompute_modules": None,
    "distribute_saved_activations": False,
    # What only training does.
    "mtp_num_layers": None,
    "perform_initialization": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "yaml_cfg": None,
}
"""Megatron's arguments that say how a model is run, and what one process takes."""

# What Megatron's local layers in one process would compute otherwise than training did, or not at all.
_REFUSED: tuple[tuple[str, str], ...] = (
    ("hybrid_layer_pattern", "it is a hybrid model"),
    ("spec", "its layers come from --spec"),
    ("heterogeneous_layers_config_path", "its layers differ (--heterogeneous-layers-config-path)"),
    ("experimental_attention_variant", "it has another attention (--experimental-attention-variant)"),
    ("mla_down_proj_fusion", "its down projections are one weight (--mla-down-proj-fusion)"),
    (
        "moe_mlp_glu_interleave_size",
        "the rows of its experts' weights are interleaved (--moe-mlp-glu-interleave-size)",
    ),
    (
        "moe_expert_capacity_factor",
        "its experts drop tokens, so what it computes depends on the batch (--moe-expert-capacity-factor)",
    ),
)

_TE_ACTIVATIONS = {
    "use_te_activation_func": "--use-te-activation-func",
    "use_transformer_engine_op_fuser": "--use-transformer-engine-op-fuser",
}


def refuse_other_computation(args: Namespace) -> None:
    """Refuse a model that one process would not compute as training did.

    Parameters
    ----------
    args
        Megatron's arguments, as they are saved with a checkpoint.

    Raises
    ------
    UsageError
        With what the model has.
    """
    reasons = [reason for name, reason in _REFUSED if getattr(args, name, None) not in (None, False)]
    for name, flag in _TE_ACTIVATIONS.items():
        if getattr(args, name, False) and not _is_plain_swiglu(args):
            reasons.append(
                f"its activation is Transformer Engine's ({flag}), which is the same for plain SwiGLU only"
            )
    if reasons:
        raise UsageError(
            f"one process can't compute this model as it was trained: {'; '.join(reasons)}. Measure it "
            "while training, by --eval-iters"
        )


def _is_plain_swiglu(args: Namespace) -> bool:
    """Tell whether the activation is SwiGLU, not clamped: every implementation of that is the same."""
    changed = (getattr(args, "activation_func_clamp_value", None), getattr(args, "glu_linear_offset", 0.0))
    return args.swiglu and changed == (None, 0.0)


def arguments_of_one_process(args: Namespace) -> Namespace:
    """Return Megatron's arguments for the same model in one process, in fp32."""
    alone = copy.copy(args)
    for name, value in EXECUTION.items():
        setattr(alone, name, value)
    # As Megatron's validate_args does, which arguments that were only parsed have not seen.
    alone.bias_gelu_fusion = alone.bias_gelu_fusion and alone.add_bias_linear
    return alone
