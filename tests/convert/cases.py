"""Models that can be exported: flags, and what their export must say."""

from dataclasses import dataclass

from tests.convert.checkpoints import BIASES, COMMON, MUP, UNTIED


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
}

ONE_PER_TARGET = {case.target: name for name, case in reversed(CASES.items())}
