"""An export's config.json has what published models of its architecture have, and what runtimes insist on."""

import pytest
from transformers import AutoConfig

from tests.convert.cases import ONE_PER_TARGET

SIZES = {
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "tie_word_embeddings",
    "attention_dropout",
    "use_cache",
    "torch_dtype",
}
LLAMA = SIZES | {"head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "attention_bias"}
EXPERTS = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"}
WINDOWS = {"sliding_window", "layer_types"}
# Those of each architecture's published models: GLM-4-9B-0414, HyperCLOVAX-SEED-Think-14B, Llama-3.2-1B,
# Qwen3-4B, EXAONE-4.0-1.2B, MiniMax-Text-01-hf, Mixtral-8x7B-v0.1, Qwen3-30B-A3B, Qwen1.5-MoE-A2.7B and
# GLM-4.5-Air; lfm3 is transformers' own configuration.
PUBLISHED = {
    "glm4": LLAMA - {"rope_scaling"} | {"partial_rotary_factor", "eos_token_id", "pad_token_id"},
    "hyperclovax": LLAMA
    | {"mlp_bias", "attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"}
    | {"use_post_norm", "bos_token_id", "eos_token_id", "pad_token_id"},
    "lfm3": SIZES - {"hidden_act"}
    | WINDOWS
    | {
        "head_dim",
        "norm_eps",
        "rope_parameters",
        "use_sandwich_norm",
        "use_attention_gate",
        "attention_bias",
    },
    "llama": LLAMA | {"mlp_bias", "bos_token_id", "eos_token_id"},
    "qwen3": LLAMA
    | {"use_sliding_window", "sliding_window", "max_window_layers", "bos_token_id", "eos_token_id"},
    "exaone4": LLAMA - {"attention_bias"}
    | WINDOWS
    | {"sliding_window_pattern", "bos_token_id", "eos_token_id", "pad_token_id"},
    "minimax": SIZES
    | {"head_dim", "rms_norm_eps", "rope_theta", "num_local_experts", "num_experts_per_tok", "layer_types"}
    | {"postnorm", "full_attn_alpha_factor", "full_attn_beta_factor", "mlp_alpha_factor", "mlp_beta_factor"},
    "olmo2": LLAMA - {"head_dim"} | {"bos_token_id", "eos_token_id", "pad_token_id"},
    "olmo3": LLAMA - {"head_dim"} | WINDOWS | {"bos_token_id", "eos_token_id", "pad_token_id"},
    "afmoe": LLAMA
    | WINDOWS
    | EXPERTS - {"decoder_sparse_step"}
    | {"num_shared_experts", "num_dense_layers", "route_scale", "mup_enabled", "global_attn_every_n_layers"},
    "kolibri1": LLAMA - {"intermediate_size", "rope_theta", "rope_scaling", "attention_bias"}
    | WINDOWS
    | EXPERTS - {"decoder_sparse_step"}
    | {"norm_topk_prob", "shared_expert_intermediate_size", "rope_parameters"},
    "mixtral": SIZES
    | {"rms_norm_eps", "rope_theta", "sliding_window", "num_local_experts", "num_experts_per_tok"}
    | {"bos_token_id", "eos_token_id"},
    "qwen3_moe": LLAMA
    | {"use_sliding_window", "sliding_window", "max_window_layers", "mlp_only_layers", "norm_topk_prob"}
    | EXPERTS
    | {"bos_token_id", "eos_token_id"},
    "qwen2_moe": LLAMA - {"head_dim", "rope_scaling", "attention_bias"}
    | {"use_sliding_window", "sliding_window", "max_window_layers", "norm_topk_prob"}
    | EXPERTS
    | {"shared_expert_intermediate_size", "bos_token_id", "eos_token_id"},
    "glm4_moe": LLAMA - {"rope_scaling"}
    | {"partial_rotary_factor", "moe_intermediate_size", "num_experts_per_tok", "n_routed_experts"}
    | {"n_shared_experts", "routed_scaling_factor", "n_group", "topk_group", "first_k_dense_replace"}
    | {"norm_topk_prob", "use_qk_norm", "num_nextn_predict_layers", "eos_token_id", "pad_token_id"},
}
# Settings of transformers' classes that an export is silent about.
SILENT = {
    "initializer_range": "draws new weights",
    "pretraining_tp": "1 but in the pretraining of Llama 1",
    "conv_bias": "of convolutions, and there are none",
    "conv_L_cache": "of convolutions, and there are none",
    "block_size": "of linear attention, and there is none",
    "linear_attn_alpha_factor": "of linear attention, and there is none",
    "linear_attn_beta_factor": "of linear attention, and there is none",
    "output_router_logits": "off",
    "router_aux_loss_coef": "of a loss that is added where the router's logits are returned",
    "router_jitter_noise": "off",
}
# Fields that have no default in the runtime's own reading of config.json, from the sources of mistral.rs
# (after 0.8), candle (after 0.9) and mlx-lm 0.32.2.
UNREAD = {
    "architectures",
    "model_type",
    "tie_word_embeddings",
    "attention_dropout",
    "use_cache",
    "torch_dtype",
}
MISTRAL_RS = SIZES - UNREAD | {"rms_norm_eps", "rope_theta"}
MLX_LM = MISTRAL_RS - {"hidden_act"} | {"head_dim", "tie_word_embeddings"}
INSISTED = {
    ("mistral.rs", "glm4"): MISTRAL_RS,
    ("mistral.rs", "llama"): MISTRAL_RS - {"hidden_act"},
    ("mistral.rs", "qwen3"): MISTRAL_RS | {"max_window_layers", "use_sliding_window"},
    ("candle", "glm4"): MISTRAL_RS | {"tie_word_embeddings"},
    ("candle", "qwen3"): MLX_LM | {"hidden_act", "attention_bias", "max_window_layers", "use_sliding_window"},
    ("mlx-lm", "glm4"): MLX_LM - {"tie_word_embeddings"} | {"attention_bias", "partial_rotary_factor"},
    ("mlx-lm", "llama"): MLX_LM,
    ("mlx-lm", "qwen3"): MLX_LM,
    ("mlx-lm", "exaone4"): MLX_LM | {"rope_scaling", "sliding_window", "sliding_window_pattern"},
}

each_target = pytest.mark.parametrize("target", ONE_PER_TARGET)


@pytest.fixture
def config(exported, config_of):
    return lambda target: config_of(exported(ONE_PER_TARGET[target])[0])


@each_target
def test_keys_of_published_models(config, target):
    assert PUBLISHED[target] - config(target).keys() == set()


@each_target
def test_every_setting_of_transformers_is_written_or_needless(exported, config, target):
    read = AutoConfig.from_pretrained(exported(ONE_PER_TARGET[target])[0])
    common = type(read).__mro__[1]().to_dict().keys()
    written = config(target).keys() | {read.attribute_map.get(key, key) for key in config(target)}
    unwritten = read.to_dict().keys() - common - written
    assert unwritten - SILENT.keys() == set()


@pytest.mark.parametrize(("runtime", "target"), INSISTED)
def test_what_a_runtime_insists_on(config, runtime, target):
    assert INSISTED[runtime, target] - config(target).keys() == set()


def test_values(config):
    qwen, exaone = config("qwen3"), config("exaone4")
    assert qwen["max_window_layers"] == qwen["num_hidden_layers"] == 3
    assert exaone["rope_scaling"] is None
    clova = config("hyperclovax")
    assert clova["attention_multiplier"] == clova["head_dim"] ** -0.5
    names = ("embedding_multiplier", "logits_scaling", "residual_multiplier")
    assert [clova[name] for name in names] == [1.0, 1.0, 1.0]


@each_target
def test_rotary_parameters_say_the_same_twice(config, target):
    settings = config(target)
    parameters = settings["rope_parameters"]
    if target == "lfm3":  # newer than the other way of saying it
        assert "rope_theta" not in settings and "rope_scaling" not in settings
        return
    if target == "olmo3":
        assert parameters["sliding_attention"] == parameters["full_attention"]
        parameters = parameters["full_attention"]
    assert settings["rope_theta"] == parameters["rope_theta"]
    assert settings["rope_scaling"] is None and parameters["rope_type"] == "default"
    assert settings.get("partial_rotary_factor") == parameters.get("partial_rotary_factor")
