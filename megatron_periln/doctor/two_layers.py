"""A training step of the model that the flags describe, with two of its layers: by pretraining itself.

``python -m megatron_periln.doctor.two_layers [flags of pretraining]`` leaves of the flags what decides how
the model computes, and pretrains by them for a step, on generated tokens, in this process alone. What is left
out is about where: other ranks, files, datasets, how long.
"""

from __future__ import annotations

import re
import sys
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Sequence

__all__ = ["shortened"]

_KEPT_GROUPS = {
    "transformer configuration",
    "network size",
    "regularization",
    "mixed precision",
    "moe",
    "mla",
    "Transformer-Engine",
    "experimental",
    "norm placement",
    "device",
}
"""Groups of Megatron's parser, and of ours, that say how a model computes."""

_KEPT = re.compile(
    "seq_length|seed|te_rng_tracker|optimizer.*|.*_fusion|apply_rope_fusion|rope_type|use_flash_attn|"
    "no_persist_layer_norm|recompute_activations|cuda_graph_modules|use_distributed_optimizer|overlap_grad_reduce|"
    "overlap_param_gather|ddp_.*|disable_jit_fuser|reset_position_ids|reset_attention_mask|eod_mask_loss|"
    "init_method_xavier_uniform"
)
"""Names of arguments of other groups that do, too."""

_LEFT_OUT = re.compile(
    "tensor_.*|pipeline_.*|sequence_parallel|context_.*|hierarchical_.*|hybrid_context_parallel|max_seqlen_.*|"
    "expert_.*|tp_comm_.*|overlap_moe_.*|overlap_dispatch_.*|ep_overlap_.*|delay_wgrad_.*|use_ring_exchange_p2p|"
    "defer_embedding_.*|wgrad_deferral_limit|overlap_p2p_.*|microbatch_group_.*|mtp_standalone|account_for_.*|"
    "moe_token_dispatcher_type|moe_enable_deepep|moe_flex_.*|moe_.*hybridep.*|moe_ncclep_.*|moe_deepep_.*|"
    "moe_shared_expert_overlap|high_priority_.*|symmetric_ar_type|cpu_offloading_.*|first_last_layers_bf16|"
    "num_layers_at_.*|config_logger_dir|moe_use_upcycling|moe_upcycling_.*|gradient_reduce_div_fusion|"
    "init_model_with_meta_device|hybrid_override_pattern"
)
"""Names in those groups that are about ranks, or about layers that are not among the two."""

_BY_LAYER = {
    "--moe-layer-freq": "([0]*1+[1]*1)",
    "--window-attn-skip-freq": "2",
    "--no-rope-freq": "2",
    "--recompute-num-layers": "1",
    "--mtp-num-layers": "1",
}
"""What flags of single layers become: one of each kind."""

_LENGTH_ON_CPU = 128  # a step of a large model would take minutes
_SEPARATOR = "/"  # before multi-token prediction in a hybrid model's pattern


def shortened(words: Sequence[str], parser: ArgumentParser, args: Namespace) -> list[str]:
    """Return the flags of a short run of the model with two layers.

    Parameters
    ----------
    words
        The flags of pretraining, and others.
    parser, args
        Megatron's parser with our flags, and what it made of ``words``.
    """
    groups = {
        name: group.title or ""
        for group in parser._action_groups
        for action in group._group_actions
        for name in action.option_strings
    }
    kept = [
        word
        for flag, action, values in _flags(words, parser)
        if _is_kept(action, groups.get(flag.partition("=")[0], ""))
        for word in (flag, *values)
    ]
    given = {word.partition("=")[0] for word in kept}
    for flag, value in _BY_LAYER.items():
        kept += [flag, value] if flag in given else []
    if args.hybrid_layer_pattern:
        kept += ["--hybrid-layer-pattern", _one_of_each(args.hybrid_layer_pattern)]
    else:
        kept += ["--num-layers", "2"]
    if args.num_experts:
        kept += ["--num-experts", str(_experts_of_a_rank(args))]
    if args.device == "cpu" and (args.seq_length or 0) > _LENGTH_ON_CPU:
        kept += ["--seq-length", str(_LENGTH_ON_CPU)]
    graphs = args.cuda_graph_impl not in (None, "none")
    steps = args.cuda_graph_warmup_steps + 2 if graphs else 1
    kept += ["--micro-batch-size", "1", "--global-batch-size", "1", "--train-iters", str(steps)]
    kept += ["--lr", "1e-4", "--lr-decay-style", "constant", "--log-interval", "1"]
    kept += ["--eval-interval", "1000", "--eval-iters", "0", "--num-workers", "0"]
    # The null tokenizer has an id of its own for the end of a document.
    vocabulary = args.vocab_size or args.padded_vocab_size or 32000
    return [*kept, "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocabulary - 1)]


def _flags(words: Sequence[str], parser: ArgumentParser) -> list[tuple[str, Action | None, list[str]]]:
    """Return each flag, what it is to the parser, and its values."""
    found: list[tuple[str, Action | None, list[str]]] = []
    for word in words:
        action = parser._option_string_actions.get(word.partition("=")[0])
        if action is not None or word.startswith("--"):
            found.append((word, action, []))
        elif found:
            found[-1][2].append(word)
    return found


def _is_kept(action: Action | None, group: str) -> bool:
    if action is None:
        return False
    name = action.dest
    if name == "experimental_attention_variant" or group in _KEPT_GROUPS:
        return not _LEFT_OUT.fullmatch(name)
    return _KEPT.fullmatch(name) is not None and not _LEFT_OUT.fullmatch(name)


def _one_of_each(pattern: str) -> str:
    layers, *predictions = pattern.split(_SEPARATOR)
    kinds = "".join(dict.fromkeys(layers.replace("|", "")))
    return _SEPARATOR.join([kinds, *predictions[:1]])


def _experts_of_a_rank(args: Namespace) -> int:
    """Return how many experts a rank has, if that is enough to choose from; else all."""
    here = args.num_experts // max(1, args.expert_model_parallel_size)
    return int(here if here >= args.moe_router_topk and not args.moe_router_num_groups else args.num_experts)


def _main(words: list[str]) -> None:
    from megatron_periln import pretrain  # the step, which may crash

    pretrain.choose_device(words)
    # After the line above, which decides what Megatron is.
    from megatron_periln.megatron_arguments import megatron_arguments
    from megatron_periln.training.parsing import add_arguments

    parsers: list[ArgumentParser] = []

    def add_and_keep(parser: ArgumentParser) -> ArgumentParser:
        parsers.append(add_arguments(parser))
        return parser

    args = megatron_arguments(words, add_and_keep, ignore_unknown=True)
    sys.argv[1:] = shortened(words, parsers[0], args)
    pretrain.main()


if __name__ == "__main__":
    _main(sys.argv[1:])
