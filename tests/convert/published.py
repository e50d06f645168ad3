"""Random models of transformers with the settings of published ones, in folders of their own."""

import torch
import transformers

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
FULL = {"layer_types": ["full_attention"] * 3}

# As the published models have them: GLM-4-0414 with query biases and half of each head rotating.
MODELS = {
    "glm4": {"attention_bias": True, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "hyperclovax": {"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "hyperclovax, tied": {"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    "llama": {"rms_norm_eps": 1e-5},
    "llama, tied, biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    # As Llama 3.1 and 3.2 have it.
    "llama, scaled rotary": {"rope_parameters": LLAMA3 | {"factor": 8.0}},
    "llama, tied, scaled rotary": {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
    # As deepseek-coder has it.
    "llama, linear scaling": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0}
    },
    "llama, linear scaling by what rounds": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
    },
    # As Qwen3's page says for 131072 positions.
    "qwen3, YaRN": {"max_window_layers": 3, "rope_parameters": YARN},
    "qwen3": {"max_window_layers": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "exaone4": {"sliding_window": None, **FULL},
    # As EXAONE-4.0-32B has it.
    "exaone4, windows": {"sliding_window": 8, "sliding_window_pattern": 3},
    "olmo2": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "olmo3": {
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    # As Trinity has it.
    "afmoe": {
        **EXPERTS,
        "num_experts": 6,
        "num_shared_experts": 1,
        "route_scale": 2.5,
        "sliding_window": 8,
        "global_attn_every_n_layers": 3,
    },
    "kolibri1": {
        **EXPERTS,
        "num_experts": 6,
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": 80,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "mixtral": {"num_local_experts": 6},
    "qwen3_moe": {**EXPERTS, "num_experts": 6, "norm_topk_prob": True},
    # As Qwen1.5-MoE has it.
    "qwen2_moe": {
        **EXPERTS,
        "head_dim": 16,
        "num_experts": 6,
        "shared_expert_intermediate_size": 80,
        "mlp_only_layers": [1],
        "max_window_layers": 3,
    },
    # As GLM-4.5 has it.
    "glm4_moe": {
        **EXPERTS,
        "n_routed_experts": 6,
        "use_qk_norm": True,
        "attention_bias": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
    },
    "glm4_moe, groups": {
        **EXPERTS,
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
    },
}


def quietly(_):
    pass


def make(folder, name, dtype=torch.float32, **changes):
    """Save a random model of transformers, its norms' weights and its biases random too."""
    settings = {**SIZES, **MODELS.get(name, {}), **changes}
    config = transformers.AutoConfig.for_model(name.split(",")[0], **settings)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            # Of experts, all in one tensor, each is a matrix.
            parameter.copy_(noise / parameter.size(-1) ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias") and "kolibri1" not in config.model_type:
                buffer.copy_(0.1 * torch.randn(buffer.shape))
    model.to(dtype).save_pretrained(folder)
    return folder
