"""What decides how a model with given weights computes, in a run and in the checkpoint that it loads.

Megatron compares sizes of a model with its checkpoint's, and ``--use-checkpoint-args`` takes them from it.
A model of those sizes computes something else with another norm epsilon, rotary base or router.
"""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace
from typing import Any

from megatron_periln.checkpoints.intact import FLAG_GROUP
from megatron_periln.errors import UsageError
from megatron_periln.training.idle_flags import is_idle

__all__ = [
    "MODEL_SETTINGS",
    "add_model_arguments",
    "adopt_model",
    "given_settings",
    "refuse_other_model",
    "setting",
]

MODEL_SETTINGS = frozenset(
    [
        "activation_func_clamp_value",
        "add_bias_linear",
        "add_qkv_bias",
        "attention_output_gate",
        "bias_gelu_fusion",
        "dsa_indexer_head_dim",
        "dsa_indexer_k_norm_epsilon",
        "dsa_indexer_loss_coeff",
        "dsa_indexer_n_heads",
        "dsa_indexer_rope_interleaved",
        "dsa_indexer_rotate_activation",
        "dsa_indexer_scoring_relu",
        "dsa_indexer_skip_topk_offset",
        "dsa_indexer_topk",
        "dsa_indexer_topk_freq",
        "dsa_indexer_use_sparse_loss",
        "experimental_attention_variant",
        "ffn_hidden_size",
        "glu_linear_offset",
        "group_query_attention",
        "heterogeneous_layers_config_encoded_json",
        "heterogeneous_layers_config_path",
        "hidden_size",
        "hybrid_layer_pattern",
        "kv_channels",
        "kv_lora_rank",
        "layernorm_epsilon",
        "layernorm_zero_centered_gamma",
        "linear_attention_freq",
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_value_head_dim",
        "mamba_head_dim",
        "mamba_num_groups",
        "mamba_num_heads",
        "mamba_state_dim",
        "max_position_embeddings",
        "mla_down_proj_fusion",
        "moe_apply_probs_on_input",
        "moe_expert_capacity_factor",
        "moe_ffn_hidden_size",
        "moe_input_jitter_eps",
        "moe_latent_size",
        "moe_layer_freq",
        "moe_mlp_glu_interleave_size",
        "moe_router_force_biased",
        "moe_router_force_load_balancing",
        "moe_router_group_topk",
        "moe_router_num_groups",
        "moe_router_pre_softmax",
        "moe_router_score_function",
        "moe_router_topk",
        "moe_router_topk_scaling_factor",
        "moe_shared_expert_gate",
        "moe_shared_expert_glu_interleave_size",
        "moe_shared_expert_intermediate_size",
        "moe_token_drop_policy",
        "mscale",
        "mscale_all_dim",
        "mtp_num_layers",
        "mtp_use_repeated_layer",
        "multi_latent_attention",
        "mup_attn_scale_power",
        "mup_base_head_dim",
        "mup_base_hidden_size",
        "mup_embedding_mult",
        "mup_output_mult",
        "no_rope_freq",
        "normalization",
        "num_attention_heads",
        "num_experts",
        "num_layers",
        "num_query_groups",
        "position_embedding_type",
        "q_lora_rank",
        "qk_head_dim",
        "qk_l2_norm",
        "qk_layernorm",
        "qk_pos_emb_head_dim",
        "quick_geglu",
        "rope_scaling_factor",
        "rope_type",
        "rotary_base",
        "rotary_interleaved",
        "rotary_percent",
        "rotary_scaling_factor",
        "rotary_seq_len_interpolation_factor",
        "softmax_type",
        "spec",
        "squared_relu",
        "swiglu",
        "untie_embeddings_and_output_weights",
        "use_mup",
        "use_rope_scaling",
        "v_head_dim",
        "whole_qk_norm",
        "window_attn_skip_freq",
        "window_size",
        "yarn_beta_fast",
        "yarn_beta_slow",
        "yarn_correction_range_round_to_int",
        "yarn_original_max_position_embeddings",
    ]
)
"""Arguments of Megatron's that change the model, as tests/training/flags.json says and proves."""

_ABSENT = object()
# What --spec names in recipes of pretrain_hybrid.py and pretrain_mamba.py: the stack without it, too.
_DEFAULT_STACKS = {"hybrid_stack_spec", "mamba_stack_spec"}
# What Megatron derives where it is not given, which arguments that were only parsed have not seen.
_DERIVED = {"ffn_hidden_size", "kv_channels", "moe_ffn_hidden_size"}
# What an older Megatron calls it.
_FORMER = {"layernorm_epsilon": "norm_epsilon"}


def add_model_arguments(parser: ArgumentParser) -> None:
    """Add the flag that lets a model differ from its checkpoint's, and one that imports write."""
    groups = {group.title: group for group in parser._action_groups}
    groups[FLAG_GROUP].add_argument(
        "--allow-model-changes",
        action="store_true",
        help="load one whose model computed otherwise",
    )
    # Not for the help: it only stays with the checkpoints, for an export to take the padding off again.
    groups[FLAG_GROUP].add_argument("--unpadded-vocab-size", type=int, metavar="IDS", help=SUPPRESS)


def given_settings(args: Namespace, parser: ArgumentParser) -> dict[str, Any]:
    """Return the settings of the model that were given, other than their defaults."""
    return {
        name: value for name in MODEL_SETTINGS if (value := getattr(args, name)) != parser.get_default(name)
    }


def adopt_model(args: Namespace, saved: Namespace, given: dict[str, Any]) -> None:
    """Set what decides how the model computes to the checkpoint's, as ``--use-checkpoint-args`` asks.

    Parameters
    ----------
    args
        The run's, as parsed; changed in place.
    saved
        The checkpoint's.
    given
        As `given_settings` returns it: what was given and differs is kept, for `refuse_other_model` to see.
    """
    for name in MODEL_SETTINGS:
        value = given.get(name, setting(saved, name))
        if value is not _ABSENT:
            setattr(args, name, value)
    args.unpadded_vocab_size = args.unpadded_vocab_size or getattr(saved, "unpadded_vocab_size", None)


def refuse_other_model(args: Namespace, saved: Namespace | None, folder: str) -> None:
    """Refuse a checkpoint whose model computed something else than this run's would.

    Parameters
    ----------
    args
        The run's, validated.
    saved
        The checkpoint's, None if there is none, or none with arguments.
    folder
        Where it is, for the message.

    Raises
    ------
    UsageError
        Naming each setting, with both values; not with ``--allow-model-changes``.
    """
    if saved is None or args.allow_model_changes:
        return
    differences = [
        f"{_flag(name)} {_shown(before)}, and here {_shown(setting(args, name))}"
        for name in sorted(_comparable(args, saved))
        if not _same(before := setting(saved, name), setting(args, name))
    ]
    if differences:
        raise UsageError(
            f"the checkpoint in {folder} was trained with another model: {'; '.join(differences)}; give what "
            "it was trained with, or --allow-model-changes if the change is meant"
        )


def _comparable(args: Namespace, saved: Namespace) -> set[str]:
    names = {
        name for name in MODEL_SETTINGS if setting(saved, name) is not _ABSENT and not is_idle(name, args)
    }
    names -= {"heterogeneous_layers_config_path"}  # its content is compared
    names -= {name for name in _DERIVED if setting(saved, name) is None}
    if args.moe_use_upcycling:  # a mixture, from a dense checkpoint
        names -= {name for name in names if name.startswith("moe_")} | {"num_experts", "ffn_hidden_size"}
    if args.position_embedding_type != "learned_absolute":
        names.discard("max_position_embeddings")
    if args.swiglu or args.squared_relu or args.quick_geglu or not args.add_bias_linear:
        names.discard("bias_gelu_fusion")
    if bool(args.hybrid_layer_pattern) != bool(getattr(saved, "hybrid_layer_pattern", None)):
        # Megatron loads a GPT into a hybrid model, whose other layers are new.
        names -= {"hybrid_layer_pattern", "num_layers"}
        names -= {name for name in names if name.startswith("mamba_")}
    return names


def setting(args: Namespace, name: str) -> Any:
    """Return a setting in the one form in which it is compared, `_ABSENT` if it is not there."""
    value: Any = getattr(args, name, getattr(args, _FORMER.get(name, name), _ABSENT))
    if name == "spec" and isinstance(value, list | tuple) and value[-1] in _DEFAULT_STACKS:
        return None
    if name == "hybrid_layer_pattern" and value not in (None, _ABSENT):
        return value.replace("|", "")  # which stage a layer is on
    if name == "add_qkv_bias" and value is not _ABSENT:
        return value or getattr(args, "add_bias_linear", False)
    if name == "activation_func_clamp_value" and getattr(args, "swiglu", False):
        return (
            None if getattr(args, "bias_swiglu_fusion", False) else value
        )  # its fused kernel does not clamp
    return list(value) if isinstance(value, tuple) else value


def _same(one: Any, other: Any) -> bool:
    return bool(one == other)


def _flag(name: str) -> str:
    return {
        "layernorm_epsilon": "--norm-epsilon",
        "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    }.get(name, f"--{name.replace('_', '-')}")


def _shown(value: Any) -> str:
    return "off" if value is False or value is None else "on" if value is True else str(value)
