"""What one process sets does not change what a model computes."""

import pytest
import torch
from megatron.training.argument_utils import gpt_config_from_args

from megatron_periln.cpu.flags import adapt_arguments
from megatron_periln.errors import UsageError
from megatron_periln.models import GPTModelConfig
from megatron_periln.models.execution import EXECUTION
from megatron_periln.models.one_process import build_model, megatron_config, megatron_logits
from megatron_periln.norms.arguments import placement_of
from tests.convert.checkpoints import BIASES, COMMON, MUP, arguments, randomize, sample

NO_SWIGLU = COMMON.replace("--swiglu", "")
MOE = COMMON + "--num-experts 4 --moe-router-topk 2 "
LATENT = """--num-layers 2 --hidden-size 64 --ffn-hidden-size 112 --num-attention-heads 4
    --padded-vocab-size 160 --max-position-embeddings 64 --seq-length 64 --normalization RMSNorm --swiglu
    --disable-bias-linear
    --position-embedding-type rope --multi-latent-attention --kv-lora-rank 16 --qk-head-dim 16
    --qk-pos-emb-head-dim 8 --v-head-dim 24 """

MODELS = {
    "fused SwiGLU, which does not clamp": COMMON + "--activation-func-clamp-value 0.1",
    "SwiGLU that clamps": COMMON + "--activation-func-clamp-value 0.1 --no-bias-swiglu-fusion",
    "SwiGLU with an offset": COMMON + "--glu-linear-offset 1 --no-bias-swiglu-fusion",
    "experts of fused SwiGLU": MOE + "--activation-func-clamp-value 0.1",
    "experts that clamp": MOE + "--activation-func-clamp-value 0.1 --no-bias-swiglu-fusion",
    "fused GELU, by tanh": BIASES.replace("--swiglu", ""),
    "exact GELU": BIASES.replace("--swiglu", "") + "--no-bias-gelu-fusion",
    "GELU without biases": NO_SWIGLU,
    "quick GEGLU": NO_SWIGLU + "--quick-geglu --activation-func-clamp-value 0.1 --glu-linear-offset 1",
    "experts of quick GEGLU": MOE.replace("--swiglu", "--quick-geglu") + "--activation-func-clamp-value 0.1",
    "squared ReLU": NO_SWIGLU + "--squared-relu",
    "LayerNorm": BIASES.replace("RMSNorm", "LayerNorm"),
    "learned positions": COMMON.replace("--position-embedding-type rope", ""),
    "YaRN": COMMON.replace("type rope", "type yarn") + "--rotary-scaling-factor 4",
    "interpolated positions": COMMON + "--rotary-seq-len-interpolation-factor 4",
    "window": COMMON + "--window-size 8,0",
    "sink": COMMON + "--softmax-type learnable",
    "gated attention": COMMON + "--attention-output-gate",
    "scores divided by the layer's number": COMMON + "--apply-query-key-layer-scaling",
    "latent attention": LATENT,
    "multipliers": COMMON + MUP,
}

BY_LAYOUT = "tests/parallel compares every layout's loss with one process's"
BACKWARD = "the forward pass does not read it"
ROUNDING = "it says how numbers are rounded"
KERNEL = "a GPU's kernel of the same function, which does not run here"
READ = "it is read while a model is made, or by training"

PROOFS = {
    "tensor_model_parallel_size": BY_LAYOUT,
    "pipeline_model_parallel_size": BY_LAYOUT,
    "virtual_pipeline_model_parallel_size": BY_LAYOUT,
    "context_parallel_size": BY_LAYOUT,
    "hierarchical_context_parallel_sizes": BY_LAYOUT,
    "expert_model_parallel_size": BY_LAYOUT,
    "expert_tensor_parallel_size": BY_LAYOUT,
    "sequence_parallel": BY_LAYOUT,
    "pipeline_model_parallel_layout": BY_LAYOUT,
    "decoder_first_pipeline_num_layers": BY_LAYOUT,
    "decoder_last_pipeline_num_layers": BY_LAYOUT,
    "account_for_embedding_in_pipeline_split": BY_LAYOUT,
    "account_for_loss_in_pipeline_split": BY_LAYOUT,
    "overlap_p2p_comm": BY_LAYOUT,
    "tp_comm_overlap": BY_LAYOUT,
    "overlap_moe_expert_parallel_comm": BY_LAYOUT,
    "moe_flex_dispatcher_backend": BY_LAYOUT,
    "moe_enable_deepep": BY_LAYOUT,
    "moe_token_dispatcher_type": MOE + "--moe-token-dispatcher-type alltoall",
    "moe_shared_expert_overlap": MOE + "--moe-token-dispatcher-type alltoall "
    "--moe-shared-expert-intermediate-size 32 --moe-shared-expert-overlap",
    "transformer_impl": KERNEL,
    "attention_backend": KERNEL,
    "use_transformer_engine_op_fuser": KERNEL,
    "use_te_activation_func": KERNEL,
    "no_persist_layer_norm": KERNEL,
    "gradient_accumulation_fusion": BACKWARD,
    "masked_softmax_fusion": KERNEL,
    "apply_rope_fusion": KERNEL,
    "bias_dropout_fusion": COMMON + "--norm-placement pre",
    "moe_grouped_gemm": MOE + "--moe-grouped-gemm",
    "moe_permute_fusion": KERNEL,
    "moe_router_fusion": KERNEL,
    "cuda_graph_impl": KERNEL,
    "te_rng_tracker": READ,
    "fp16": ROUNDING,
    "bf16": ROUNDING,
    "fp8": ROUNDING,
    "fp8_param_gather": ROUNDING,
    "fp4": ROUNDING,
    "fp4_param_gather": ROUNDING,
    "te_precision_config_file": ROUNDING,
    "moe_router_padding_for_quantization": ROUNDING,
    "fp32_residual_connection": COMMON + "--fp32-residual-connection",
    "cpu_offloading": BACKWARD,
    "fine_grained_activation_offloading": BACKWARD,
    "recompute_granularity": COMMON
    + "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "recompute_method": COMMON
    + "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "recompute_num_layers": COMMON
    + "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "recompute_modules": COMMON + "--recompute-granularity selective --recompute-modules core_attn",
    "distribute_saved_activations": BACKWARD,
    "mtp_num_layers": COMMON + "--mtp-num-layers 1",
    "perform_initialization": COMMON,
    "attention_dropout": COMMON,
    "hidden_dropout": COMMON,
    "yaml_cfg": READ,
}
"""By setting: a model and a way to run it in which the setting is another; or why it needs none."""


def trained(flags):
    """Return the arguments with which training under ``--device cpu`` builds a model, and that model."""
    args = arguments(flags)
    adapt_arguments(args)
    args.bias_gelu_fusion = args.bias_gelu_fusion and args.add_bias_linear  # as Megatron's validate_args
    args.tensor_model_parallel_size = args.pipeline_model_parallel_size = 1
    config = gpt_config_from_args(args, model_config_cls=GPTModelConfig)
    config.norm_placement = placement_of(args)
    return args, randomize(build_model(config))


def difference(flags):
    """Return how far one process's logits are from those of the model that training built."""
    args, theirs = trained(flags)
    ours = build_model(megatron_config(args))
    left = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not left.missing_keys and all(name.startswith("mtp.") for name in left.unexpected_keys)
    logits = [megatron_logits(model, sample()) for model in (ours, theirs)]
    assert 0.2 < logits[1].std().item() < 5
    return args, (logits[0] - logits[1]).abs().max().item()


@pytest.mark.parametrize("name", MODELS)
def test_one_process_computes_what_training_does(single_process, name):
    assert difference(MODELS[name])[1] <= 1e-6


@pytest.mark.parametrize(
    "one, other",
    [
        ("fused SwiGLU, which does not clamp", "SwiGLU that clamps"),
        ("fused GELU, by tanh", "exact GELU"),
        ("experts of fused SwiGLU", "experts that clamp"),
    ],
)
def test_a_fusion_of_the_activation_is_part_of_the_model(single_process, one, other):
    logits = [megatron_logits(trained(MODELS[name])[1], sample()) for name in (one, other)]
    assert (logits[0] - logits[1]).abs().max().item() > 1e-4


def test_every_setting_of_one_process_has_a_proof():
    assert PROOFS.keys() == EXECUTION.keys()


@pytest.mark.parametrize("name", [name for name, proof in PROOFS.items() if proof.startswith("--num-layers")])
def test_a_setting_of_one_process_does_not_change_the_model(single_process, name):
    args, apart = difference(PROOFS[name])
    assert getattr(args, name) != EXECUTION[name]
    assert apart <= 1e-6


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"hybrid_layer_pattern": "*-*-"}, "it is a hybrid model"),
        ({"spec": ["my", "layers"]}, "its layers come from --spec"),
        ({"heterogeneous_layers_config_path": "layers.json"}, "its layers differ"),
        ({"experimental_attention_variant": "dsa"}, "it has another attention"),
        ({"mla_down_proj_fusion": True}, "its down projections are one weight"),
        ({"moe_mlp_glu_interleave_size": 32}, "the rows of its experts' weights are interleaved"),
        ({"moe_expert_capacity_factor": 1.0}, "its experts drop tokens"),
        ({"use_te_activation_func": True, "activation_func_clamp_value": 7.0}, "is Transformer Engine's"),
        ({"use_transformer_engine_op_fuser": True, "swiglu": False}, "is Transformer Engine's"),
    ],
)
def test_what_one_process_computes_otherwise_is_refused(change, reason):
    args = arguments(COMMON)
    for name, value in change.items():
        assert hasattr(args, name), name
        setattr(args, name, value)
    with pytest.raises(UsageError, match=f"can't compute this model as it was trained: .*{reason}"):
        megatron_config(args)


def test_transformer_engine_s_swiglu_is_the_same(single_process):
    args, theirs = trained(COMMON)
    args.use_te_activation_func, args.bias_swiglu_fusion = True, False
    ours = build_model(megatron_config(args))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(megatron_logits(ours, sample()), megatron_logits(theirs, sample()))


def test_what_megatron_refuses_to_build_is_one_line():
    args = arguments(COMMON)
    args.no_rope_freq = 2  # of 3 layers
    with pytest.raises(UsageError, match="Megatron can't build this model in one process: "):
        megatron_config(args)
