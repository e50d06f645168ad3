"""Flags that are given and change nothing in a run: each is named, with the reason.

Megatron's parser has the flags of every kind of training, and those of features that another flag turns on.
tests/training/flags.json says of each flag what it does.
"""

from __future__ import annotations

import functools
import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.datasets.object_storage_utils import is_object_storage_path

from megatron_periln.cpu.flags import low_precision
from megatron_periln.data.split import is_divided
from megatron_periln.training.packages import installed
from megatron_periln.vocabulary_files import KINDS

__all__ = ["OTHER_MODELS", "idle_flags", "is_idle"]

# Of what belongs to other models than these.
OTHER_MODELS = "and this trains GPT-style models"

# Groups of Megatron's parser, and what their flags belong to.
_OTHER_GROUPS = {
    "rl": "it belongs to reinforcement learning",
    "biencoder": f"it belongs to retrievers, {OTHER_MODELS}",
    "vision": f"it belongs to vision models, {OTHER_MODELS}",
    "inference": "it belongs to inference",
}

# What is in these groups, and acts all the same.
_ACTING = {"cuda_graph_modules", "cuda_graph_scope_deprecated", "perform_rl_step"}

_Condition = Callable[[Namespace], Any]


def _needs(flag: str, attribute: str | None = None) -> tuple[_Condition, str]:
    name = attribute or flag.removeprefix("--").replace("-", "_")
    return lambda args: getattr(args, name, None), f"it needs {flag}"


def _package(name: str, module: str) -> tuple[_Condition, str]:
    return lambda args: installed(module), f"it needs the package {name}"


def _never(reason: str) -> tuple[_Condition, str]:
    return lambda args: False, reason


def _rotary(args: Namespace) -> bool:
    return args.position_embedding_type in ("rope", "yarn", "mrope") or args.multi_latent_attention


def _balances(args: Namespace) -> bool:
    types = args.moe_router_load_balancing_type
    return any("aux_loss" in kind for kind in ([types] if isinstance(types, str) else types))


def _interleaved(args: Namespace) -> Any:
    return (
        args.num_layers_per_virtual_pipeline_stage
        or args.num_virtual_stages_per_pipeline_rank
        or args.pipeline_model_parallel_layout
    )


def _above_one(flag: str) -> tuple[_Condition, str]:
    name = flag.removeprefix("--").replace("-", "_")
    return lambda args: getattr(args, name) > 1, f"it needs {flag} above 1"


def _replicated(args: Namespace) -> bool:
    sizes = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    return args.world_size > sizes


def _tokenizers(*types: str) -> tuple[_Condition, str]:
    return lambda args: args.tokenizer_type in (None, *types), f"it needs --tokenizer-type {types[0]}"


def _reads_vocabulary(args: Namespace) -> bool:
    """Tell whether a tokenizer is made of ``--vocab-file``: transformers 5 prefers a tokenizer.json."""
    if args.tokenizer_type == "HuggingFaceTokenizer":
        return not Path(args.tokenizer_model or "", "tokenizer.json").is_file()
    return args.tokenizer_type in (None, *KINDS)


def _in_object_storage(args: Namespace) -> bool:
    paths = [args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path]
    named = [path for each in paths for path in each or ()]
    return bool(args.data_args_path or args.per_split_data_args_path) or any(
        map(is_object_storage_path, named)
    )


def _graphs(args: Namespace) -> bool:
    return args.cuda_graph_impl != "none" or args.enable_cuda_graph or args.external_cuda_graph


_LOADING = (lambda args: args.load or args.pretrained_checkpoint, "it needs --load")
_VOCABULARY = (_reads_vocabulary, "it needs --tokenizer-type GPT2BPETokenizer")
_EVALUATING = (lambda args: args.eval_iters or args.full_validation, "--eval-iters 0 evaluates nothing")

_Rows = tuple[tuple[str, tuple[_Condition, str]], ...]
# Names of arguments, as a regular expression for the whole name; whether they act; why they don't otherwise.
# An argument acts if it does by every row that has its name.
_MIXTURES: _Rows = (
    ("moe_shared_expert_(?!intermediate_size).*", _needs("--moe-shared-expert-intermediate-size")),
    ("moe_token_drop_policy", _needs("--moe-expert-capacity-factor")),
    ("moe_router_num_groups", _needs("--moe-router-group-topk")),
    ("moe_router_bias_update_rate", _needs("--moe-router-enable-expert-bias")),
    ("moe_aux_loss_coeff", (_balances, "it needs --moe-router-load-balancing-type aux_loss")),
    ("moe_upcycling_granularity", _needs("--moe-use-upcycling")),
    (
        "moe_(flex_dispatcher|deepep|hybridep|ncclep)_.*",
        (lambda args: args.moe_token_dispatcher_type == "flex", "it needs --moe-token-dispatcher-type flex"),
    ),
    ("moe_paged_stash_.*", _needs("--moe-paged-stash")),
    ("moe_routing_trace_(?!path).*", _needs("--moe-routing-trace-path")),
    ("moe_pad_experts_for_cuda_graph_inference", _never("it belongs to inference")),
    ("save_tokens_per_expert_interval", _needs("--num-experts")),
    ("ep_overlap_.*", _needs("--overlap-moe-expert-parallel-comm")),
)
_PARALLELISM: _Rows = (
    ("sequence_parallel", _above_one("--tensor-model-parallel-size")),
    ("cp_comm_type|hierarchical_context_parallel_sizes", _above_one("--context-parallel-size")),
    ("account_for_.*_in_pipeline_split", _above_one("--pipeline-model-parallel-size")),
    (
        "overlap_p2p_comm|align_(grad_reduce|param_gather)|microbatch_group_size_per_vp_stage",
        (_interleaved, "it needs virtual stages, by --num-layers-per-virtual-pipeline-stage"),
    ),
    (
        "ddp_(num_buckets|bucket_size)",
        (
            lambda args: args.overlap_grad_reduce or args.use_megatron_fsdp,
            "it needs --overlap-grad-reduce",
        ),
    ),
    ("ddp_pad_buckets_for_high_nccl_busbw", _needs("--use-distributed-optimizer")),
    (
        "dist_ckpt_optim_fully_reshardable|distrib_optim_fully_reshardable_mem_efficient",
        _needs("--use-distributed-optimizer"),
    ),
    (
        "data_parallel_random_init|check_weight_hash_across_dp_replicas_interval",
        (_replicated, "it needs several data-parallel ranks"),
    ),
    ("disable_symmetric_registration", _needs("--use-nccl-ub", "nccl_ub")),
    ("sharp_enabled_group", _needs("--use-sharp")),
    ("wgrad_deferral_limit", _needs("--defer-embedding-wgrad-compute")),
    ("cuda_graph_(modules|scope_deprecated|warmup_steps)", (_graphs, "it needs --cuda-graph-impl")),
    (
        "(apply_wd_to_qk_layernorm|no_weight_decay_cond_type)",
        (lambda args: args.qk_layernorm or args.multi_latent_attention, "it needs --qk-layernorm"),
    ),
)
_CHECKPOINTS: _Rows = (
    (
        "save_(interval|retain_interval)|async_save|no_save_(optim|rng)|ckpt_fully_parallel_save.*|"
        "ckpt_assume_constant_structure|log_progress",
        _needs("--save"),
    ),
    ("async_save", _needs("--use-persistent-ckpt-worker")),
    ("async_(strategy|ckpt_.*)|use_persistent_ckpt_worker", _needs("--async-save")),
    (
        "no_load_(optim|rng)|ckpt_step|exit_on_missing_checkpoint|ckpt_fully_parallel_load.*|finetune|"
        "dist_ckpt_strictness|override_.*|load_main_params_from_ckpt|auto_detect_ckpt_format|"
        "ckpt_load_validate_sharding_integrity|allow_(model|data)_changes|use_checkpoint_opt_param_scheduler|"
        "stream_ckpt_dequant",
        _LOADING,
    ),
    (
        "checkpoint_verify|ckpt_format|dist_ckpt_workers|verify_integrity",
        (
            lambda args: args.load or args.save or args.pretrained_checkpoint,
            "it needs --load or --save",
        ),
    ),
    ("ckpt_convert_(save|update_legacy_dist_opt_format)", _needs("--ckpt-convert-format")),
    ("use_(tokenizer_model_from|mp_args_from)_checkpoint_args", _needs("--use-checkpoint-args")),
    ("exit_signal", _needs("--exit-signal-handler")),
    ("error_injection_type", _needs("--error-injection-rate")),
)
_DATA: _Rows = (
    ("split", (is_divided, "mock data are divided evenly, and data by part as they are named")),
    ("start_eval_at_iter|eval_(micro|global)_batch_size", _EVALUATING),
    ("vocab_file|merge_file", _VOCABULARY),
    (
        "metadata_path|special_tokens",
        (lambda args: args.tokenizer_type != "NullTokenizer", "NullTokenizer has none"),
    ),
    (
        "reset_position_ids",
        (
            lambda args: (
                args.position_embedding_type == "learned_absolute" and not args.multi_latent_attention
            ),
            "it needs --position-embedding-type learned_absolute: no other reads positions",
        ),
    ),
    (
        "object_storage_cache_path",
        (_in_object_storage, "it needs data in object storage"),
    ),
    ("max_seqlen_per_dp_cp_rank", _never("sequences are not packed in pretraining")),
    ("tiktoken_.*", _tokenizers("TikTokenizer")),
    ("null_tokenizer_.*", _tokenizers("NullTokenizer")),
    (
        "tokenizer_sentencepiece_.*",
        _tokenizers("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"),
    ),
    ("tokenizer_hf_.*|trust_remote_code", _tokenizers("HuggingFaceTokenizer", "SFTTokenizer", *KINDS)),
    (
        "tokenizer_model",
        (
            lambda args: args.tokenizer_type not in ("NullTokenizer", *KINDS),
            "this --tokenizer-type reads none",
        ),
    ),
    ("chat_template", _never("it formats conversations, and pretraining has none")),
)
_LOGS: _Rows = (
    ("log_.*_to_tensorboard|tensorboard_(log_interval|queue_size)", _needs("--tensorboard-dir")),
    (
        "wandb_project",
        (lambda args: args.tensorboard_dir, "its run stays empty without --tensorboard-dir"),
    ),
    (
        "flight_recorder_.*(?<!dump_path)",
        (
            lambda args: args.flight_recorder_dump_path or "TORCH_FR_DUMP_TEMP_FILE" in os.environ,
            "it needs --flight-recorder-dump-path",
        ),
    ),
)

_FEATURES: _Rows = (
    (
        "moe_use_upcycling|moe_(?!routing_trace|layer_freq).*|use_grouped_gemm_for_shared_expert|overlap_moe_.*|"
        "expert_.*|overlap_dispatch_.*|ep_overlap_.*|high_priority_a2a_comm_stream",
        _needs("--num-experts"),
    ),
    ("moe_routing_trace.*", _needs("--num-experts")),
    (
        "moe_layer_freq",
        (
            lambda args: args.num_experts and not args.hybrid_layer_pattern,
            "it needs --num-experts, without --hybrid-layer-pattern",
        ),
    ),
    ("num_layers", (lambda args: not args.hybrid_layer_pattern, "--hybrid-layer-pattern says how many")),
    (
        "q_lora_rank|kv_lora_rank|qk_head_dim|qk_pos_emb_head_dim|v_head_dim|mla_down_proj_fusion|rope_type",
        _needs("--multi-latent-attention"),
    ),
    ("cache_mla_latents|flash_decode|mlp_chunks_for_prefill", _never("it belongs to inference")),
    (
        "inference_.*|use_legacy_.*|symmetric_ar_type|nccl_all_reduce_for_prefill",
        _never("it belongs to inference"),
    ),
    (
        "rotary_scaling_factor|mscale|mscale_all_dim",
        (
            lambda args: args.multi_latent_attention or args.position_embedding_type == "yarn",
            "it needs --multi-latent-attention or --position-embedding-type yarn",
        ),
    ),
    (
        "yarn_.*",
        (
            lambda args: args.position_embedding_type == "yarn" and not args.multi_latent_attention,
            "it needs --position-embedding-type yarn, without --multi-latent-attention",
        ),
    ),
    (
        "rotary_(base|percent|interleaved|seq_len_interpolation_factor)",
        (_rotary, "it needs --position-embedding-type rope"),
    ),
    (
        "mrope_section",
        (lambda args: args.position_embedding_type == "mrope", "it needs --position-embedding-type mrope"),
    ),
    ("num_query_groups", _needs("--group-query-attention")),
    (
        "kv_channels",
        (
            lambda args: not args.multi_latent_attention,
            "--multi-latent-attention has --qk-head-dim and --v-head-dim",
        ),
    ),
    (
        "position_embedding_type",
        (
            lambda args: args.position_embedding_type != "none" or not args.multi_latent_attention,
            "--multi-latent-attention has rotary positions of its own",
        ),
    ),
    ("window_attn_skip_freq", _needs("--window-size")),
    (
        "dsa_.*",
        (
            lambda args: (
                args.experimental_attention_variant == "dsa" or "D" in (args.hybrid_layer_pattern or "")
            ),
            "it needs --experimental-attention-variant dsa",
        ),
    ),
    (
        "linear_.*",
        (
            lambda args: (
                args.experimental_attention_variant == "gated_delta_net"
                or "G" in (args.hybrid_layer_pattern or "")
            ),
            "it needs --experimental-attention-variant gated_delta_net",
        ),
    ),
    (
        "mamba_.*|use_mamba_mem_eff_path",
        (
            lambda args: "M" in (args.hybrid_layer_pattern or ""),
            "it needs Mamba layers in --hybrid-layer-pattern",
        ),
    ),
    ("mup_.*", _needs("--use-mup")),
    ("qk_clip_.*", _needs("--qk-clip")),
    (
        "mtp_.*(?<!mtp_num_layers)",
        (
            lambda args: args.mtp_num_layers or "/" in (args.hybrid_layer_pattern or ""),
            "it needs --mtp-num-layers",
        ),
    ),
    ("muon_.*", (lambda args: "muon" in args.optimizer, "it needs --optimizer muon")),
    ("lion_.*", (lambda args: args.optimizer != "adam", "it needs --optimizer lion")),
    ("adam_.*", (lambda args: args.optimizer != "sgd", "it needs --optimizer adam")),
    ("sgd_momentum", (lambda args: args.optimizer == "sgd", "it needs --optimizer sgd")),
    (
        "lr_wsd_.*",
        (lambda args: args.lr_decay_style == "WSD", "it needs --lr-decay-style WSD"),
    ),
    (
        "(start|end)_weight_decay",
        (lambda args: args.weight_decay_incr_style != "constant", "it needs --weight-decay-incr-style"),
    ),
    (
        "loss_scale|initial_loss_scale|min_loss_scale|loss_scale_window|hysteresis",
        _needs("--fp16"),
    ),
    ("without_fp8", (low_precision, "nothing asks for FP8 or FP4")),
    ("fp8_.*|first_last_layers_bf16|num_layers_at_.*_in_bf16", _needs("--fp8-format", "fp8")),
    ("fp4_.*", _needs("--fp4-format", "fp4")),
    (
        "megatron_fsdp_.*|fsdp_.*|data_parallel_sharding_strategy|outer_dp_sharding_strategy|"
        "suggested_communication_unit_size|keep_fp8_transpose_cache|enable_full_sharding_in_hsdp|"
        "strict_fsdp_dtensor_load",
        _needs("--use-megatron-fsdp"),
    ),
    (
        "init_model_with_meta_device",
        (
            lambda args: args.use_megatron_fsdp,
            "only --use-megatron-fsdp initializes such weights: they are initialized as without this flag",
        ),
    ),
    ("torch_fsdp2_.*", _needs("--use-torch-fsdp2")),
    ("tp_comm_(?!overlap$).*", _needs("--tp-comm-overlap")),
    ("recompute_(method|num_layers|modules)|distribute_saved_activations", _needs("--recompute-granularity")),
    (
        "offload_modules|.*_offloaded_.*|delay_offload_.*|delta_offload_.*|activation_offload_fraction|"
        "fine_grained_offloading_.*",
        _needs("--fine-grained-activation-offloading"),
    ),
    ("cpu_offloading_.*", _needs("--cpu-offloading-num-layers")),
    (
        "use_torch_optimizer_for_cpu_offload|optimizer_offload_fraction|overlap_cpu_optimizer_.*|pin_cpu_.*",
        _needs("--optimizer-cpu-offload"),
    ),
    ("profile_.*|pytorch_profiler_.*|use_pytorch_profiler|record_shapes|nvtx_ranges", _needs("--profile")),
    ("memory_snapshot_path", _needs("--record-memory-history")),
    ("manual_gc_.*", _needs("--manual-gc")),
    ("inprocess_.+(?<!restart)", _needs("--inprocess-restart")),
    ("inprocess_restart", _package("nvidia-resiliency-ext", "nvidia_resiliency_ext")),
    (
        "one_logger_.*|enable_one_logger|app_tag_.*",
        _package("one-logger", "one_logger"),
    ),
    ("log_energy", _package("nvidia-ml-py", "pynvml")),
    ("calc_ft_timeouts|ft_num_warmup_iters", _needs("--enable-ft-package")),
    ("straggler_.*|disable_straggler_on_startup", _needs("--log-straggler")),
    ("adlr_autoresume_interval", _needs("--adlr-autoresume")),
    ("fim_(?!data).*", _needs("--fim-data")),
    ("wandb_(?!project).*", _needs("--wandb-project")),
    ("logits_save_(?!dir).*", _needs("--logits-save-dir")),
    ("logits_load_(?!dir).*", _needs("--logits-load-dir")),
    (
        "fault_injector_(?!ranks|num_ranks).*",
        (
            lambda args: (args.fault_injector_ranks, args.fault_injector_num_ranks) != (None, None),
            "it needs --fault-injector-ranks or --fault-injector-num-ranks",
        ),
    ),
    ("sft_.*", _needs("--sft")),
    ("non_persistent_(?!save).*", _needs("--non-persistent-save-interval")),
    ("replication_.*", _needs("--replication")),
    ("validation_set_names", _needs("--multiple-validation-sets")),
    (
        "monitor_(?!layers).*",
        _needs("--monitor-layers"),
    ),
    ("cross_entropy_fusion_impl", _needs("--cross-entropy-loss-fusion")),
    (
        "fp16_lm_cross_entropy",
        _never(
            "megatron-core reads it no more: the loss is computed in fp32, or by --cross-entropy-loss-fusion"
        ),
    ),
    ("kitchen_attention_backend", _needs("--use-kitchen-attention")),
    (
        "glu_linear_offset",
        (lambda args: args.swiglu or args.quick_geglu, "it needs --swiglu or --quick-geglu"),
    ),
    ("head_lr_mult|data_sharding", _never(f"it belongs to vision models, {OTHER_MODELS}")),
    (
        "bert_binary_head|mask_prob|short_seq_prob|sample_rate|titles_.*",
        _never(f"it belongs to BERT and T5, {OTHER_MODELS}"),
    ),
    (
        "recompute_granularity",
        (lambda args: not args.recompute_activations, "--recompute-activations makes it selective"),
    ),
    ("lr_wsd_decay_samples", (lambda args: not args.train_iters, "--train-iters counts iterations")),
    ("lr_wsd_decay_iters", (lambda args: not args.train_samples, "--train-samples counts samples")),
    ("vocab_extra_ids", _never(f"it belongs to T5, {OTHER_MODELS}")),
    (
        "use_flash_attn",
        _never(
            "megatron-core reads it no more: Transformer Engine chooses the kernel of attention, and "
            "--attention-backend flash insists on FlashAttention"
        ),
    ),
    ("deprecated_use_mcore_models", _never("every model is one of megatron-core's")),
    ("use_dist_ckpt_deprecated|dist_ckpt_format_deprecated", _never("--ckpt-format has taken its place")),
    (
        "ckpt_fully_parallel_save_deprecated",
        _never("it is so, unless --no-ckpt-fully-parallel-save is given"),
    ),
    ("add_position_embedding", _never("--position-embedding-type says which there is")),
    *_MIXTURES,
    *_PARALLELISM,
    *_CHECKPOINTS,
    *_DATA,
    *_LOGS,
)


def idle_flags(args: Namespace, parser: ArgumentParser) -> list[str]:
    """Return the flags that were given and change nothing, each with the reason.

    Parameters
    ----------
    args
        As parsed, before anything is derived from them.
    parser
        Which has parsed them.
    """
    values = vars(args)
    # Of some 1,500 flags a few dozen are given, at most.
    given = [each for each in parser._actions if values.get(each.dest, each.default) is not each.default]
    defaults: dict[str, list[Any]] = {action.dest: [] for action in given}
    for action in parser._actions:
        if action.dest in defaults:
            defaults[action.dest].append(action.default)
    groups = {id(action): group.title for group in parser._action_groups for action in group._group_actions}
    found = []
    for action in given:
        value = values[action.dest]
        if value in defaults[action.dest] or (action.const is not None and action.const != value):
            continue
        if reason := _why_idle(action.dest, groups.get(id(action)) or "", args):
            found.append(f"{action.option_strings[0]} ({reason})")
    return found


def is_idle(name: str, args: Namespace) -> bool:
    """Tell whether an argument changes nothing in a run, whatever its value."""
    return _why_idle(name, "", args) is not None


def _why_idle(name: str, group: str, args: Namespace) -> str | None:
    rows = _rows(name)
    for acts, reason in rows:
        if not acts(args):
            return reason
    if not rows and name not in _ACTING and not getattr(args, "perform_rl_step", False):
        return _OTHER_GROUPS.get(group)
    return None


@functools.cache
def _rows(name: str) -> list[tuple[_Condition, str]]:
    return [row for matches, row in _patterns() if matches(name)]


@functools.cache
def _patterns() -> list[tuple[Callable[[str], object], tuple[_Condition, str]]]:
    return [(re.compile(pattern).fullmatch, row) for pattern, row in _FEATURES]
