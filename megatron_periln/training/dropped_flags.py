"""Flags that Megatron parses and prints, and whose setting it drops: made to act, or refused."""

from __future__ import annotations

import sys
from argparse import Namespace

from megatron_periln.norms import NormPlacement
from megatron_periln.rules import Check, Rule

__all__ = ["DROPPED", "make_flags_act"]


def _rope(args: Namespace) -> bool:
    rope = args.position_embedding_type == "rope" or args.use_rotary_position_embeddings
    return rope and not _latent(args)


def _latent(args: Namespace) -> bool:
    """Tell whether attention is multi-latent, which has rotary embeddings of its own."""
    return args.multi_latent_attention or bool(set(args.hybrid_layer_pattern or "") & set("LD"))


def _hybrid_mtp(args: Namespace) -> bool:
    return "/" in args.hybrid_layer_pattern or args.mtp_hybrid_override_pattern is not None


def _gated(args: Namespace) -> bool:
    return args.swiglu or args.quick_geglu


DROPPED: tuple[Check, ...] = (
    Rule(
        lambda args: args.apply_residual_connection_post_layernorm,
        "--apply-residual-connection-post-layernorm: megatron-core reads it no more; drop it, "
        "--norm-placement says where norms stand",
    ),
    Rule(
        lambda args: args.openai_gelu,
        "--openai-gelu: megatron-core reads it no more; drop it, its GELU is the approximation by tanh where "
        "bias and GELU are fused, as they are by default",
    ),
    Rule(
        lambda args: args.onnx_safe,
        "--onnx-safe: megatron-core reads it no more; drop it",
    ),
    Rule(
        lambda args: args.position_embedding_type == "relative",
        "--position-embedding-type relative: GPT has none, and would train without positions; "
        "give rope, yarn, "
        "mrope, learned_absolute or none",
    ),
    Rule(
        lambda args: (
            not args.add_position_embedding
            and args.position_embedding_type == "learned_absolute"
            and not args.use_rotary_position_embeddings
        ),
        "--no-position-embedding: megatron-core reads --position-embedding-type in its place; give "
        "--position-embedding-type none, or rope",
        {"add_position_embedding": True, "position_embedding_type": "none"},
    ),
    Rule(
        lambda args: args.relative_attention_num_buckets != 32 or args.relative_attention_max_distance != 128,
        "--relative-attention-num-buckets and --relative-attention-max-distance belong to T5; drop them",
    ),
    Rule(
        lambda args: args.use_rope_scaling and not _rope(args),
        "--use-rope-scaling scales --position-embedding-type rope alone; drop it, and with "
        "--multi-latent-attention give --rope-type yarn and --rotary-scaling-factor",
        {"use_rope_scaling": False},
    ),
    Rule(
        lambda args: args.rope_scaling_factor != 8.0 and not args.use_rope_scaling,
        "--rope-scaling-factor needs --use-rope-scaling; give both, or neither",
    ),
    Rule(
        lambda args: args.rotary_seq_len_interpolation_factor and _latent(args),
        "--rotary-seq-len-interpolation-factor does not reach --multi-latent-attention; give "
        "--rope-type yarn "
        "and --rotary-scaling-factor",
    ),
    Rule(
        lambda args: args.no_rope_freq and _latent(args),
        "--no-rope-freq does not reach --multi-latent-attention; drop it",
    ),
    Rule(
        lambda args: args.no_rope_freq and args.hybrid_layer_pattern,
        "--no-rope-freq does not reach hybrid models; drop it",
    ),
    Rule(
        lambda args: args.position_embedding_type in ("yarn", "mrope") and _latent(args),
        "--multi-latent-attention has rotary embeddings of its own; give --position-embedding-type rope, and "
        "--rope-type yarn for YaRN",
    ),
    Rule(
        lambda args: args.rotary_percent != 1.0 and _latent(args) and args.rope_type != "rope",
        "--rotary-percent does not reach --multi-latent-attention but with --rope-type rope; give it too",
    ),
    Rule(
        lambda args: args.position_embedding_type == "mrope",
        "--position-embedding-type mrope wants the positions of images; give rope",
    ),
    Rule(
        lambda args: (
            args.use_mup and (args.mup_base_head_dim or args.mup_attn_scale_power != 1.0) and _latent(args)
        ),
        "--mup-base-head-dim and --mup-attn-scale-power do not reach --multi-latent-attention; drop them",
    ),
    Rule(
        lambda args: args.add_qkv_bias and not args.add_bias_linear and _latent(args),
        "--add-qkv-bias does not reach --multi-latent-attention; drop it",
    ),
    Rule(
        lambda args: args.mtp_num_layers and args.hybrid_layer_pattern and not _hybrid_mtp(args),
        "--mtp-num-layers does not reach a hybrid model without a pattern for them; give "
        "--hybrid-layer-pattern MAIN/MTP",
    ),
    Rule(
        lambda args: args.qk_l2_norm and args.qk_layernorm,
        "--qk-l2-norm and --qk-layernorm are two norms of queries and keys; give one of them",
    ),
    Rule(
        lambda args: args.activation_func_clamp_value is not None and not _gated(args),
        "--activation-func-clamp-value clamps gated linear units alone; give --swiglu or "
        "--quick-geglu, or drop "
        "it",
    ),
    Rule(
        lambda args: (
            args.activation_func_clamp_value is not None
            and (args.use_te_activation_func or args.use_transformer_engine_op_fuser)
        ),
        "--activation-func-clamp-value does not reach Transformer Engine's activation; drop "
        "--use-te-activation-func and --use-transformer-engine-op-fuser",
    ),
    Rule(
        lambda args: args.use_mup and args.mup_width_mult != 1.0,
        "--mup-width-mult: megatron-core takes --hidden-size over --mup-base-hidden-size for it; drop it",
        {"mup_width_mult": 1.0},
    ),
    Rule(
        lambda args: args.checkpoint_activations,
        "--checkpoint-activations: megatron-core ends without a word for the scheduler; give "
        "--recompute-activations, or --recompute-granularity and --recompute-method",
        {"checkpoint_activations": False},
    ),
    Rule(
        lambda args: args.config_logger_dir,
        "--config-logger-dir: megatron-core can't copy the process groups that it wants to write; "
        "drop it, the "
        "arguments are printed and saved with each checkpoint",
    ),
    Rule(
        lambda args: args.dist_ckpt_save_pre_mcore_014,
        "--dist-ckpt-save-pre-mcore-014: megatron-core reads it no more; drop it, checkpoints "
        "have the format "
        "of megatron-core 0.14 and later",
    ),
    Rule(
        lambda args: args.exit_signal_handler_for_dataloader,
        "--exit-signal-handler-for-dataloader: megatron-core reads it no more; give "
        "--exit-signal-handler, which "
        "its workers heed",
    ),
)
"""What nothing in megatron-core 0.19 computes, or what it would drop without a word."""


def make_flags_act(args: Namespace) -> list[str]:
    """Change what would keep a flag from acting; return one line for each change, or for what can't act.

    Parameters
    ----------
    args
        Megatron's and ours, before their validation; changed in place. ``embedding_norm`` is True or False.
    """
    lines = []
    # --position-embedding-type says whether there are; beside False, Megatron takes no type but rope.
    args.add_position_embedding = True
    if args.eval_interval is None and (args.skip_train or args.full_validation):
        args.eval_interval = sys.maxsize  # at the end alone: Megatron divides by it where it resumes
    elif args.eval_interval is None:
        args.eval_interval = 1000  # without evaluations too: Megatron divides by it
        if args.eval_iters:
            lines.append(
                "--eval-interval is not given: 1000, as by default before megatron-core 0.16; give it, or "
                "--eval-iters 0"
            )
    if args.activation_func_clamp_value is not None and args.swiglu and args.bias_swiglu_fusion:
        args.bias_swiglu_fusion = False
        lines.append(
            "--activation-func-clamp-value: SwiGLU is computed without its fused kernel, which does not clamp"
        )
    if not args.use_megatron_fsdp:
        # Megatron would leave weights as the memory was. `idle_flags` says so.
        args.init_model_with_meta_device = False
    if args.exit_signal_handler_for_training:
        args.exit_signal_handler_for_training, args.exit_signal_handler = False, True
        lines.append(
            "--exit-signal-handler-for-training ends a run at once with status 0, as if it were done, and "
            "saves nothing: --exit-signal-handler is taken, which saves after the step"
        )
    lines += _cancelled_by_norms(args)
    return lines


def _cancelled_by_norms(args: Namespace) -> list[str]:
    """Return what norms divide out again, but for their epsilon, in one line each."""
    lines = []
    if args.use_mup and args.mup_embedding_mult != 1.0 and args.embedding_norm:
        lines.append(
            f"--mup-embedding-mult {args.mup_embedding_mult:g} changes nothing but the embedding "
            "norm's epsilon: "
            "that norm divides it out again; give --no-embedding-norm for it to act"
        )
    scaled = args.num_experts and not args.moe_shared_expert_intermediate_size
    if NormPlacement.named(args.norm_placement).output and scaled:
        for given, flag in (
            (args.moe_router_topk_scaling_factor, "--moe-router-topk-scaling-factor"),
            (args.moe_router_pre_softmax and args.moe_router_topk > 1, "--moe-router-pre-softmax"),
        ):
            if given:
                lines.append(
                    f"{flag} changes nothing but the output norms' epsilon: it scales what the experts give, "
                    "and these norms divide it out again"
                )
    return lines
