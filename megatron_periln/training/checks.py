"""Rules for the command line that Megatron leaves to a traceback, or to the end of the run."""

from __future__ import annotations

import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from megatron.core.quantization.utils import load_quantization_recipe
from megatron.core.transformer.enums import AttnBackend, LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_periln import cpu
from megatron_periln.cpu.flags import LOW_PRECISION
from megatron_periln.errors import UsageError, with_kind
from megatron_periln.norms.arguments import placement_of, why_norms_stay_apart, why_rule_does_not_fit
from megatron_periln.rules import Check, Rule

__all__ = ["AS_PARSED", "MODEL", "SIZES", "make_save_folder"]

# Megatron's flags that belong to another kind of training than GPT pretraining, and what they are without.
_OTHER_TRAINING = {
    "sft": ("--sft", False),
    "fim_data": ("--fim-data", False),
    "perform_rl_step": ("--perform-rl-step", False),
    "logits_load_dir": ("--logits-load-dir", None),
    "hybrid_context_parallel": ("--hybrid-context-parallel", False),
}

_WITH_LOW_PRECISION = (
    "fp8_param_gather",
    "fp4_param_gather",
    "moe_router_padding_for_fp8",
    "moe_router_padding_for_quantization",
    "reuse_grad_buf_for_mxfp8_param_ag",
)

_COUNTS = {
    "num_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "context_parallel_size": "--context-parallel-size",
    "expert_model_parallel_size": "--expert-model-parallel-size",
    "micro_batch_size": "--micro-batch-size",
    "global_batch_size": "--global-batch-size",
    "eval_micro_batch_size": "--eval-micro-batch-size",
    "eval_global_batch_size": "--eval-global-batch-size",
}


def _counts(args: Namespace) -> Iterator[str]:
    for name, flag in _COUNTS.items():
        count = getattr(args, name)
        if count is not None and count < 1:
            yield f"{flag} must be positive, not {count}"


def _divisions(args: Namespace) -> Iterator[str]:
    if next(_counts(args), None):
        return
    hidden, heads = args.hidden_size, args.num_attention_heads
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    experts, expert_tensor = args.expert_model_parallel_size, args.expert_tensor_parallel_size or tensor
    groups = args.num_query_groups if args.group_query_attention else None
    divisions = [
        ("--hidden-size", None if args.kv_channels else hidden, "--num-attention-heads", heads),
        ("--num-attention-heads", heads, "--tensor-model-parallel-size", tensor),
        ("--num-attention-heads", heads, "--num-query-groups", groups),
        ("--ffn-hidden-size", args.ffn_hidden_size, "--tensor-model-parallel-size", tensor),
        ("--num-experts", args.num_experts, "--expert-model-parallel-size", experts),
        (
            "WORLD_SIZE",
            args.world_size,
            "tensor x pipeline x context parallel size",
            tensor * pipeline * args.context_parallel_size,
        ),
        (
            "WORLD_SIZE",
            args.world_size if args.num_experts else None,
            "expert-tensor x expert x pipeline parallel size",
            expert_tensor * experts * pipeline,
        ),
    ]
    model_parallel = tensor * pipeline * args.context_parallel_size
    varies = args.rampup_batch_size or args.step_batch_size_schedule or args.decrease_batch_size_if_needed
    varies = varies or args.tensor_parallel_num_weight_shards  # which data-parallel ranks share
    if args.micro_batch_size and not varies and args.world_size % model_parallel == 0:
        step = args.micro_batch_size * (args.world_size // model_parallel)
        divisions.append(
            ("--global-batch-size", args.global_batch_size, "--micro-batch-size x data-parallel size", step)
        )
    if args.sequence_parallel:
        divisions.append(("--seq-length", args.seq_length, "--tensor-model-parallel-size", tensor))
    if args.padded_vocab_size and args.padded_vocab_size % tensor:
        yield (
            f"--padded-vocab-size ({args.padded_vocab_size}), the vocabulary, must be divisible by "
            f"--tensor-model-parallel-size ({tensor}); change one of them, or import the model again with "
            f"--make-vocab-size-divisible-by {tensor}"
        )
    for dividend_name, dividend, divisor_name, divisor in divisions:
        if dividend and divisor and dividend % divisor:
            yield (
                f"{dividend_name} ({dividend}) must be divisible by {divisor_name} ({divisor}); "
                "change one of them"
            )


SIZES: tuple[Check, ...] = (_counts, _divisions)
"""Sizes without which nothing else can be judged."""


def _other_training(args: Namespace) -> Iterator[str]:
    for name, (flag, without) in _OTHER_TRAINING.items():
        if getattr(args, name, None):
            setattr(args, name, without)
            yield f"{flag} is not part of GPT pretraining with a norm placement; drop it"


def _low_precision(args: Namespace) -> Iterator[str]:
    """Yield what goes with FP8 or FP4, and is given without; ``--device cpu`` refuses it as a whole."""
    if args.fp8 or args.fp4 or cpu.is_active():
        return
    for name in _WITH_LOW_PRECISION:
        flag, without = LOW_PRECISION[name]
        if getattr(args, name) != without:
            setattr(args, name, without)
            needed = "--fp4-format" if "fp4" in flag else "--fp8-format"
            yield f"{flag} needs {needed}; give it too, or drop {flag}"


def _non_persistent_folder(args: Namespace) -> Iterator[str]:
    if args.non_persistent_ckpt_type != "global" or not args.non_persistent_global_ckpt_dir:
        return
    folder = Path(args.non_persistent_global_ckpt_dir).resolve()
    for flag, other in (("--save", args.save), ("--load", args.load)):
        if other and folder in (Path(other).resolve(), *Path(other).resolve().parents):
            yield (
                f"--non-persistent-global-ckpt-dir {folder} holds {flag} {other}: Megatron would delete "
                "every checkpoint in it but the newest; give a folder of its own"
            )
            return


def _launcher(_: Namespace) -> Iterator[str]:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        yield (
            f"{' and '.join(missing)} not set: start with "
            "torchrun --nproc-per-node N -m megatron_periln.pretrain"
        )


AS_PARSED: tuple[Check, ...] = (
    _other_training,
    Rule(
        lambda args: args.decoder_seq_length or args.decoder_num_layers,
        "--decoder-seq-length and --decoder-num-layers belong to models of an encoder and a decoder, and "
        "this trains GPT-style models; drop them, and give --seq-length and --num-layers",
        {"decoder_seq_length": None, "decoder_num_layers": None},
    ),
    Rule(
        lambda args: args.encoder_num_layers and args.num_layers,
        "--encoder-num-layers is another name of --num-layers: this trains GPT-style models, which have no "
        "encoder; drop it",
        {"encoder_num_layers": None},
    ),
    Rule(
        lambda args: args.encoder_seq_length and args.seq_length,
        "--encoder-seq-length is another name of --seq-length: this trains GPT-style models, which have no "
        "encoder; drop it",
        {"encoder_seq_length": None},
    ),
    _low_precision,
    Rule(
        lambda args: args.save and args.save_interval is None,
        "--save needs --save-interval, the iterations between checkpoints",
        {"save_interval": 1},
    ),
    Rule(
        lambda args: args.non_persistent_save_interval and args.non_persistent_ckpt_type is None,
        "--non-persistent-save-interval needs --non-persistent-ckpt-type global or local",
        {"non_persistent_save_interval": None},
    ),
    _non_persistent_folder,
    Rule(
        lambda args: args.use_checkpoint_args and args.load is None and args.pretrained_checkpoint is None,
        "--use-checkpoint-args needs a checkpoint: give --load or --pretrained-checkpoint",
        {"use_checkpoint_args": False},
    ),
    Rule(
        lambda args: args.use_checkpoint_args and args.non_persistent_ckpt_type == "local",
        "--use-checkpoint-args can't read local checkpoints (--non-persistent-ckpt-type local); give "
        "the model's flags instead",
        {"use_checkpoint_args": False},
    ),
    _launcher,
)
"""What the flags say by themselves."""


def _layers(args: Namespace) -> Iterator[str]:
    """Yield what is wrong with layers in which a norm is to stand, or to be fused with another."""
    placement = placement_of(args)
    if reason := why_rule_does_not_fit(args, placement):
        yield reason
    pattern = args.hybrid_layer_pattern or args.hybrid_override_pattern  # its former name
    if args.fuse_pre_mlp_norm:
        reason = why_norms_stay_apart(
            placement,
            whole_layers=not pattern,
            recomputed=args.recompute_modules or (),
            offloaded=args.offload_modules or (),
            hidden_size=args.hidden_size,
        )
        if args.heterogeneous_layers_config_path or args.heterogeneous_layers_config_encoded_json:
            reason = (
                "--fuse-pre-mlp-norm: the layers of --heterogeneous-layers-config-path need not have both "
                "sublayers; drop one of them"
            )
        if reason:
            yield reason


def _layers_config(args: Namespace) -> Iterator[str]:
    """Read the file of heterogeneous layers, or its content, as a checkpoint's arguments hold it."""
    path, text = args.heterogeneous_layers_config_path, args.heterogeneous_layers_config_encoded_json
    flag = "--heterogeneous-layers-config-encoded-json"
    try:
        if text is None and path is not None:
            flag = f"--heterogeneous-layers-config-path {path}"
            text = Path(path).read_text()
        blocks = None if text is None else json.loads(text)["block_configs"]
    except OSError as error:
        yield f"{flag}: cannot be read: {error.strerror}; give a JSON file with block_configs"
    except (ValueError, LookupError, TypeError):
        yield f"{flag}: not JSON with block_configs, one for each layer; give such a file"
    else:
        if blocks is None or (isinstance(blocks, list) and len(blocks) >= (args.num_layers or 1)):
            return
        count = len(blocks) if isinstance(blocks, list) else "no list of"
        yield f"{flag}: {count} block_configs for --num-layers {args.num_layers}; give one a layer"
    args.heterogeneous_layers_config_path = args.heterogeneous_layers_config_encoded_json = None


def _precision_config(args: Namespace) -> Iterator[str]:
    if (path := args.te_precision_config_file) is None:
        return
    try:
        load_quantization_recipe(path)
        return
    except OSError as error:
        yield f"--te-precision-config-file {path}: cannot be read: {error.strerror}; give a YAML file"
    except Exception as error:  # yaml's, or of what Megatron does with something else than it expects
        yield (
            f"--te-precision-config-file {path}: not such a file as Megatron reads ({with_kind(error)}); "
            "correct it"
        )
    args.te_precision_config_file = None


def _biased_experts(args: Namespace) -> Iterator[str]:
    """Find what MLP.forward (megatron/core/transformer/mlp.py) can't do for experts one by one."""
    local = args.transformer_impl == "local"
    one_by_one = local or not args.moe_grouped_gemm
    if not (args.num_experts and args.add_bias_linear and one_by_one):
        return
    if local and args.expert_model_parallel_size == 1:
        yield (
            "--num-experts: local experts on one rank (--expert-model-parallel-size 1) can't add biases; "
            "give --disable-bias-linear"
        )
    elif args.swiglu and args.bias_swiglu_fusion:
        yield (
            "--num-experts: fused SwiGLU takes no biases of experts; give --disable-bias-linear, or "
            "--no-bias-swiglu-fusion"
        )
    elif args.bias_gelu_fusion and not (args.swiglu or args.quick_geglu or args.squared_relu):
        yield "--num-experts: GELU is not fused with biases of experts; give --no-bias-gelu-fusion"


def _pipeline_layout(args: Namespace) -> Iterator[str]:
    """Yield what is wrong with the stages that layers are dealt to."""
    layout = args.pipeline_model_parallel_layout
    if not isinstance(layout, str) or args.hybrid_layer_pattern:
        return
    flag = f"--pipeline-model-parallel-layout {layout!r}"
    try:
        stages = PipelineParallelLayerLayout.parse_str_to_list(layout)
    except AssertionError:
        yield (
            f"{flag}: its letters are E (the embedding), t (a layer), m (multi-token prediction) and L (the "
            "loss), with | between stages and (...)*N for what is repeated; correct it"
        )
        args.pipeline_model_parallel_layout = None
        return
    kinds = [kind for stage in stages for kind in stage]
    pipeline, layers, heads = args.pipeline_model_parallel_size, args.num_layers, args.mtp_num_layers or 0
    wrong = [
        (
            pipeline == 1 and len(stages) > 1,
            f"{len(stages)} stages need --pipeline-model-parallel-size above 1",
        ),
        (
            len(stages) % pipeline,
            f"{len(stages)} stages are no multiple of --pipeline-model-parallel-size {pipeline}",
        ),
        (
            layers and kinds.count(LayerType.decoder) != layers,
            f"{kinds.count(LayerType.decoder)} layers t for --num-layers {layers}",
        ),
        (
            kinds.count(LayerType.mtp) != heads,
            f"{kinds.count(LayerType.mtp)} layers m for --mtp-num-layers {heads}",
        ),
        (
            kinds[:1] != [LayerType.embedding] or kinds.count(LayerType.embedding) != 1,
            "it must begin with the one E",
        ),
        (kinds[-1:] != [LayerType.loss] or kinds.count(LayerType.loss) != 1, "it must end with the one L"),
    ]
    if found := "; ".join(text for fault, text in wrong if fault):
        yield f"{flag}: {found}; correct it"
        args.pipeline_model_parallel_layout = None


_OTHER_LAYERS = (
    *("hybrid_layer_pattern", "hybrid_override_pattern"),
    *("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
)

MODEL: tuple[Check, ...] = (
    _layers,
    _pipeline_layout,
    Rule(
        lambda args: args.pipeline_model_parallel_size == 1 and args.num_layers_per_virtual_pipeline_stage,
        "--num-layers-per-virtual-pipeline-stage divides the stages of a pipeline, and there is one; give "
        "--pipeline-model-parallel-size too, or drop it",
        {"num_layers_per_virtual_pipeline_stage": None},
    ),
    Rule(
        lambda args: args.pipeline_model_parallel_size == 1 and args.num_virtual_stages_per_pipeline_rank,
        "--num-virtual-stages-per-pipeline-rank divides the stages of a pipeline, and there is one; give "
        "--pipeline-model-parallel-size too, or drop it",
        {"num_virtual_stages_per_pipeline_rank": None},
    ),
    _layers_config,
    _precision_config,
    _biased_experts,
    Rule(
        lambda args: args.use_te_activation_func and args.transformer_impl == "local",
        "--use-te-activation-func needs Transformer Engine's layers (--transformer-impl transformer_engine); "
        "drop it",
        {"use_te_activation_func": False},
    ),
    Rule(
        lambda args: args.multi_latent_attention and args.rope_type == "rope" and args.apply_rope_fusion,
        "--rope-type rope: the fused kernel of --multi-latent-attention's rotary embeddings is of YaRN "
        "alone; give --no-rope-fusion too",
        {"apply_rope_fusion": False},
    ),
    Rule(
        lambda args: args.whole_qk_norm and not (args.qk_layernorm and args.normalization == "RMSNorm"),
        "--whole-qk-norm is an RMSNorm of queries and keys; give --qk-layernorm and --normalization RMSNorm",
    ),
    Rule(
        lambda args: (
            args.whole_qk_norm
            and any(getattr(args, name) for name in ("multi_latent_attention", *_OTHER_LAYERS))
        ),
        "--whole-qk-norm is for a GPT's attention, neither latent nor of a hybrid model or layers that "
        "differ; drop it",
        {"whole_qk_norm": False},
    ),
    Rule(
        lambda args: (
            args.whole_qk_norm
            and args.group_query_attention  # without it each head has keys of its own
            and args.num_query_groups < args.tensor_model_parallel_size
        ),
        "--whole-qk-norm needs at least as many --num-query-groups as --tensor-model-parallel-size "
        "({tensor_model_parallel_size})",
    ),
    Rule(
        lambda args: args.num_experts and args.moe_router_topk > args.num_experts,
        "--moe-router-topk ({moe_router_topk}) must be at most --num-experts ({num_experts})",
    ),
    Rule(
        lambda args: args.attention_backend is AttnBackend.local and not args.spec,
        "--attention-backend local: local layers have it by themselves; drop it, and give --transformer-impl "
        "local",
        {"attention_backend": AttnBackend.auto},
    ),
    Rule(
        lambda args: (
            args.moe_use_upcycling
            and (args.num_layers_per_virtual_pipeline_stage or args.num_virtual_stages_per_pipeline_rank)
        ),
        "--moe-use-upcycling: megatron-core takes the dense model for the mixture with virtual pipeline "
        "stages; upcycle in a run without them, and go on with them from its checkpoint",
    ),
    Rule(
        lambda args: args.multiple_validation_sets and not args.full_validation,
        "--multiple-validation-sets needs --full-validation; give it too, or drop both",
    ),
    Rule(
        lambda args: args.dist_ckpt_strictness.startswith("return_"),
        "--dist-ckpt-strictness {dist_ckpt_strictness}: megatron-core's training can't take the "
        "keys that it returns; give log_unexpected or log_all, which print them",
    ),
)
"""What can't be built of the model that the flags, or a checkpoint's arguments, describe, or not here."""


def make_save_folder(args: Namespace) -> None:
    """Make the folder that checkpoints go to, and check that it can be written.

    Raises
    ------
    UsageError
        If it can't.
    """
    if args.save is None or args.enable_msc:
        return
    folder = Path(args.save)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(bytes(4096))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UsageError(
            f"--save {folder}: cannot be written: {error.strerror or error}; "
            "give a folder that can, with room on its disk"
        ) from error
