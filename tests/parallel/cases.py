"""What is compared with one process: architectures, parallel layouts, options."""

from dataclasses import dataclass

ARCHITECTURES = {
    "dense": """--num-layers 4 --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
        --group-query-attention --num-query-groups 2 --untie-embeddings-and-output-weights""",
    # LayerNorm with shifts, linear biases, learned positions, embedding tied to the output.
    "biased": "--num-layers 4 --normalization LayerNorm --position-embedding-type learned_absolute",
    "moe": """--num-layers 4 --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
        --untie-embeddings-and-output-weights --num-experts 4 --moe-layer-freq [0,1,0,1] --moe-router-topk 2
        --moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 64 --moe-aux-loss-coeff 0
        --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall""",
    "mla": """--num-layers 4 --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
        --untie-embeddings-and-output-weights --multi-latent-attention --q-lora-rank 32 --kv-lora-rank 32
        --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16 --rope-type rope --qk-layernorm""",
    "mtp": """--num-layers 4 --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
        --untie-embeddings-and-output-weights --mtp-num-layers 1""",
}

DISTRIBUTED_OPTIMIZER = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"

LAYOUTS = {
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "TP2+SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "PP2xVPP2": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "TP2xPP2+SP": (
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel",
    ),
    "CP2": (2, "--context-parallel-size 2"),
    "DP2": (2, ""),
    "EP2": (2, "--expert-model-parallel-size 2"),
    "EP2xTP2+SP": (
        2,
        "--expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel "
        "--expert-tensor-parallel-size 1",
    ),
}


@dataclass(frozen=True)
class Case:
    """A training run that must give the numbers of one process."""

    architecture: str
    layout: str
    options: str = ""
    optimizer: str = ""
    ranks: int | None = None

    def __str__(self):
        return " ".join(filter(None, (self.architecture, self.layout, self.options, self.optimizer)))
