"""Models that can be exported: flags, and what their export must say."""

from dataclasses import dataclass

from tests.convert.checkpoints import BIASES, COMMON, EXPERTS, MUP, UNTIED


@dataclass(frozen=True)
class Case:
    flags: str
    target: str
    tied: bool = False
    asked: str = "auto"


CASES = {
    "peri": Case(COMMON + UNTIED + "--norm-placement peri", "glm4"),
    "peri, query biases, half rotary, interleaved": Case(
        COMMON + UNTIED + "--norm-placement peri --add-qkv-bias --rotary-percent 0.5 --rotary-interleaved",
        "glm4",
    ),
    "peri, half rotary": Case(COMMON + UNTIED + "--norm-placement peri --rotary-percent 0.5", "glm4"),
    "peri, tied, folded embedding norm": Case(COMMON + "--norm-placement peri", "glm4"),
    "peri, tied, no embedding norm": Case(
        COMMON + "--norm-placement peri --no-embedding-norm", "glm4", tied=True
    ),
    "peri, output epsilon, zero-centered": Case(
        COMMON + UNTIED + "--norm-placement peri --output-norm-epsilon 0.05 --apply-layernorm-1p", "glm4"
    ),
    "peri, norms of their own": Case(
        COMMON
        + UNTIED
        + """--norm-placement peri --norm-rule '{"norms": {"input": {"zero_centered": true}, "final":
        {"weight": false}, "output": {"weight": false, "epsilon": 0.05},
        "embedding": {"zero_centered": true, "epsilon": 0.1}}}'""",
        "glm4",
    ),
    "peri, scales": Case(COMMON + MUP + UNTIED + "--norm-placement peri --add-qkv-bias", "glm4"),
    "peri, scales, tied": Case(COMMON + MUP + "--norm-placement peri --no-embedding-norm", "glm4", tied=True),
    "peri, biases, output epsilon": Case(
        BIASES + UNTIED + "--norm-placement peri --output-norm-epsilon 0.05", "hyperclovax"
    ),
    "peri as hyperclovax, interleaved": Case(
        COMMON + UNTIED + "--norm-placement peri --add-qkv-bias --rotary-interleaved",
        "hyperclovax",
        asked="hyperclovax",
    ),
    "peri, norms of queries and keys": Case(
        COMMON + UNTIED + "--norm-placement peri --qk-layernorm --rotary-interleaved", "lfm3"
    ),
    "peri, norms of queries and keys, scales, biases": Case(
        COMMON + MUP + "--norm-placement peri --qk-layernorm --add-qkv-bias", "lfm3"
    ),
    "pre": Case(COMMON + UNTIED + "--norm-placement pre", "llama"),
    "pre, biases, scaled rotary": Case(
        BIASES + "--norm-placement pre --use-rope-scaling --rotary-base 500000 --embedding-norm", "llama"
    ),
    "pre, rotary scaled by 32": Case(
        COMMON + "--norm-placement pre --use-rope-scaling --rope-scaling-factor 32 --rotary-base 500000",
        "llama",
        tied=True,
    ),
    "pre, interpolated positions": Case(
        COMMON + UNTIED + "--norm-placement pre --rotary-seq-len-interpolation-factor 4", "llama"
    ),
    "peri, YaRN": Case(
        COMMON.replace("type rope", "type yarn")
        + "--norm-placement peri --rotary-scaling-factor 4 --rotary-percent 0.5",
        "glm4",
    ),
    "pre, tied, scales": Case(COMMON + MUP + "--norm-placement pre", "llama", tied=True),
    "pre, norms of queries and keys": Case(
        COMMON + "--norm-placement pre --qk-layernorm", "qwen3", tied=True
    ),
    "output": Case(COMMON + UNTIED + "--norm-placement output --qk-layernorm", "exaone4"),
    "output, tied, zero-centered": Case(
        COMMON + "--norm-placement output --qk-layernorm --no-embedding-norm --apply-layernorm-1p",
        "exaone4",
        tied=True,
    ),
    "output, heads of the hidden size together": Case(
        COMMON.replace("--kv-channels 24", "") + "--norm-placement output --qk-layernorm", "exaone4"
    ),
    "post": Case(COMMON + UNTIED + "--norm-placement post --embedding-norm", "minimax"),
    "post, tied, scales, interleaved": Case(
        COMMON + MUP + "--norm-placement post --embedding-norm --rotary-interleaved", "minimax", tied=True
    ),
    "peri, gate, windows, experts": Case(
        COMMON + UNTIED + "--norm-placement peri --qk-layernorm --attention-output-gate --window-size 8,0"
        " --window-attn-skip-freq [1,1,0] --no-rope-freq [0,0,1] --moe-layer-freq [0,1,1]"
        " --moe-router-score-function sigmoid --moe-router-enable-expert-bias"
        " --moe-router-topk-scaling-factor 1.7 --moe-shared-expert-intermediate-size 96" + EXPERTS,
        "afmoe",
    ),
    "peri, experts, scales, output epsilon": Case(
        COMMON + MUP + "--norm-placement peri --qk-layernorm --output-norm-epsilon 0.05"
        " --moe-router-score-function sigmoid" + EXPERTS,
        "afmoe",
    ),
    "peri as kolibri1, windows, experts": Case(
        COMMON + UNTIED + "--norm-placement peri --qk-layernorm --output-norm-epsilon 0.05"
        " --window-size 8,0 --window-attn-skip-freq 3 --no-rope-freq [0,0,1]"
        " --moe-router-score-function sigmoid --moe-router-topk-scaling-factor 1.7"
        " --moe-shared-expert-intermediate-size 72" + EXPERTS,
        "kolibri1",
        asked="kolibri1",
    ),
    "peri as kolibri1, experts": Case(
        COMMON
        + UNTIED
        + "--norm-placement peri --qk-layernorm --moe-router-score-function sigmoid"
        + EXPERTS,
        "kolibri1",
        asked="kolibri1",
    ),
    "output, whole queries": Case(
        COMMON.replace("--kv-channels 24", "")
        + UNTIED
        + "--norm-placement output --qk-layernorm --whole-qk-norm"
        " --apply-layernorm-1p --rotary-interleaved --output-norm-epsilon 0.05",
        "olmo2",
    ),
    "output, whole queries, windows": Case(
        COMMON.replace("--kv-channels 24", "") + UNTIED + "--norm-placement output --qk-layernorm"
        " --whole-qk-norm --window-size 8,0 --window-attn-skip-freq [1,1,0]",
        "olmo3",
    ),
    "output, windows": Case(
        COMMON + UNTIED + "--norm-placement output --qk-layernorm --window-size 8,0 --window-attn-skip-freq 3"
        " --no-rope-freq [0,0,1]",
        "exaone4",
    ),
    "pre, experts, scales, interleaved": Case(
        COMMON + MUP + "--norm-placement pre --embedding-norm --rotary-interleaved --apply-layernorm-1p"
        " --moe-router-topk-scaling-factor 1.7" + EXPERTS,
        "mixtral",
    ),
    "pre, norms of queries and keys, experts before softmax": Case(
        COMMON + UNTIED + "--norm-placement pre --qk-layernorm --moe-router-pre-softmax"
        " --moe-router-topk-scaling-factor 2.5" + EXPERTS,
        "qwen3_moe",
    ),
    "pre, norms of queries and keys, experts": Case(
        COMMON + "--norm-placement pre --qk-layernorm --add-qkv-bias --moe-layer-freq [1,0,1]" + EXPERTS,
        "qwen3_moe",
        tied=True,
    ),
    "pre, experts, shared without a gate": Case(
        COMMON.replace("--kv-channels 24", "")
        + UNTIED
        + "--norm-placement pre --moe-shared-expert-intermediate-size 72"
        + EXPERTS,
        "qwen2_moe",
    ),
    "pre, experts, shared, dense layers": Case(
        COMMON.replace("--kv-channels 24", "")
        + UNTIED
        + "--norm-placement pre --moe-layer-freq [0,1,1] --add-qkv-bias"
        " --moe-shared-expert-intermediate-size 72 --moe-shared-expert-gate" + EXPERTS,
        "qwen2_moe",
    ),
    "pre, experts by sigmoid": Case(
        COMMON + UNTIED + "--norm-placement pre --moe-layer-freq [0,1,1] --rotary-percent 0.5 --add-qkv-bias"
        " --moe-router-score-function sigmoid --moe-router-enable-expert-bias"
        " --moe-router-topk-scaling-factor 2.5 --moe-shared-expert-intermediate-size 96" + EXPERTS,
        "glm4_moe",
    ),
    "pre, norms of queries and keys, groups of experts": Case(
        COMMON + UNTIED + "--norm-placement pre --qk-layernorm --moe-router-score-function sigmoid"
        " --moe-router-num-groups 4 --moe-router-group-topk 2"
        + EXPERTS.replace("experts 6", "experts 8").replace("topk 2", "topk 4"),
        "glm4_moe",
    ),
}

ONE_PER_TARGET = {case.target: name for name, case in reversed(CASES.items())}
