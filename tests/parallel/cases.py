"""What is compared with one process: architectures, parallel layouts, options."""

from dataclasses import dataclass

_MODERN = """--num-layers 4 --normalization RMSNorm --swiglu --disable-bias-linear
    --position-embedding-type rope
    --untie-embeddings-and-output-weights"""

ARCHITECTURES = {
    "dense": f"{_MODERN} --group-query-attention --num-query-groups 2",
    # LayerNorm with its biases, linear biases, learned positions, embedding tied to the output.
    "biased": "--num-layers 4 --normalization LayerNorm --position-embedding-type learned_absolute",
    "moe": f"""{_MODERN} --num-experts 4 --moe-layer-freq [0,1,0,1] --moe-router-topk 2
        --moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 64 --moe-aux-loss-coeff 0
        --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall""",
    "mla": f"""{_MODERN} --multi-latent-attention --q-lora-rank 32 --kv-lora-rank 32 --qk-head-dim 16
        --qk-pos-emb-head-dim 8 --v-head-dim 16 --rope-type rope --qk-layernorm""",
    "mla, whole queries": f"""{_MODERN} --multi-latent-attention --kv-lora-rank 16 --qk-head-dim 16
        --qk-pos-emb-head-dim 8 --v-head-dim 16 --rope-type rope --qk-layernorm""",
    "whole query norms": f"""{_MODERN} --group-query-attention --num-query-groups 2 --qk-layernorm
        --whole-qk-norm""",
    "mtp": f"{_MODERN} --mtp-num-layers 1",
    # Mamba layers and a gated delta net beside attention.
    "states": f"""{_MODERN.replace("--num-layers 4 ", "")} --hybrid-layer-pattern M-G-*-M-
        --mamba-state-dim 16 --mamba-head-dim 16 --mamba-num-groups 2 --linear-conv-kernel-dim 4
        --linear-key-head-dim 16 --linear-value-head-dim 16 --linear-num-key-heads 2
        --linear-num-value-heads 4""",
}

LAYOUTS = {
    "1": (1, ""),
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
        "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1 "
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ),
    # Each expert is sharded, and its ranks route different numbers of tokens.
    "EP2xETP2": (
        4,
        "--expert-model-parallel-size 2 --expert-tensor-parallel-size 2 "
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ),
}

# Each parameter is gathered by itself, and must have been when it is read.
_OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 1"

OPTIONS = {
    "": "",
    "overlap": _OVERLAP,
    "fused norms": "--fuse-pre-mlp-norm",
    "overlap, fused norms": f"{_OVERLAP} --fuse-pre-mlp-norm",
    "full recompute": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "selective recompute": "--recompute-granularity selective --recompute-modules layernorm core_attn",
}

# Named rules beside the four placements, with the flags that they need.
RULES = {
    "deepnorm": "",
    "keel": "",
    "ln-scaling": "",
    "mix-ln": "",
    "hybrid-norm": "--qk-layernorm",
    "scaled-peri": "",
    "gated-peri": "",
    "gpas": "",
}

# What the one-process run must share with the run that is compared with it.
VARIANTS = {
    "": "",
    "distributed optimizer": "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
    "bf16": "--bf16",
    "zero-centered gamma": "--apply-layernorm-1p",
    "depth-scaled, epsilon": "--output-norm-init depth-scaled --output-norm-epsilon 1e-3",
    "norms of Muse, distributed optimizer": "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
    """--norm-rule '{"norms": {"embedding": {"weight": false}, "input": {"zero_centered": true}, """
    """"output": {"weight": false, "epsilon": 1e-3}}}'""",
    # Muon's iteration is in bf16 by default, and of each rank's part of a matrix.
    "muon": "--optimizer muon --muon-tp-mode duplicated --muon-fp32-matmul-prec high",
    "muon, distributed, bf16": "--optimizer muon --bf16 --use-distributed-optimizer",
    # Its documents are short: several to a sequence.
    "window, documents": "--mock-data --window-size 8,0 --reset-attention-mask",
}


@dataclass(frozen=True)
class Case:
    """A training run."""

    placement: str
    architecture: str = "dense"
    layout: str = "1"
    options: str = ""
    variant: str = ""

    @property
    def ranks(self):
        return LAYOUTS[self.layout][0]

    @property
    def model(self):
        """The flags that decide the numbers."""
        placement = f"--norm-placement {self.placement} {RULES.get(self.placement, '')}"
        return f"{ARCHITECTURES[self.architecture]} {VARIANTS[self.variant]} {placement}"

    @property
    def execution(self):
        """The flags that must not change them."""
        return f"{LAYOUTS[self.layout][1]} {OPTIONS[self.options]}"

    @property
    def one_process(self):
        return Case(self.placement, self.architecture, variant=self.variant)

    def __str__(self):
        parts = (self.placement, self.architecture, self.layout, self.options, self.variant)
        return ", ".join(part for part in parts if part)


def _cases():
    every = ("pre", "post", "peri", "output")
    distributed = "distributed optimizer"
    for placement in every:
        for layout in ("TP2", "TP2+SP", "PP2", "PP2xVPP2", "TP2xPP2+SP", "CP2", "DP2"):
            yield Case(placement, layout=layout)
        yield Case(placement, layout="DP2", variant=distributed)
        yield Case(placement, layout="TP2+SP", options="full recompute")
        yield Case(placement, layout="TP2+SP", variant="bf16")
        for architecture, layout in (
            *(("biased", layout) for layout in ("TP2+SP", "PP2")),
            *(("moe", layout) for layout in ("EP2", "TP2+SP")),
            ("mla", "TP2+SP"),
            *(("mtp", layout) for layout in ("TP2+SP", "PP2")),
        ):
            yield Case(placement, architecture, layout, variant=distributed if layout == "EP2" else "")
    for placement in ("pre", "output"):
        yield Case(placement, "biased", "PP2xVPP2", variant=distributed)
    for placement in ("post", "peri"):
        yield Case(placement, layout="DP2", options="overlap", variant=distributed)
        yield Case(placement, options="selective recompute")
        yield Case(placement, "biased", "TP2xPP2+SP")
        yield Case(placement, "moe", "EP2xTP2+SP", variant=distributed)
        yield Case(placement, "mla", "TP2")
    yield Case("peri", "moe", "EP2xETP2", variant=distributed)
    yield Case("peri", layout="TP2xPP2+SP", options="fused norms")
    yield Case("peri", layout="DP2", options="overlap, fused norms", variant=distributed)
    yield Case("peri", "mla", "CP2")
    yield Case("peri", "mla, whole queries", "TP2+SP")
    yield Case("output", "whole query norms", "TP2+SP", variant="distributed optimizer")
    yield Case("peri", "mtp", "PP2xVPP2")
    yield Case("peri", layout="TP2+SP", variant="zero-centered gamma")
    yield Case("peri", layout="TP2xPP2+SP", variant="depth-scaled, epsilon")
    for layout in ("TP2", "CP2"):
        yield Case("peri", "states", layout)
    yield Case("peri", "states", "DP2", variant=distributed)
    yield Case("peri", "states", "TP2xPP2+SP", "full recompute")
    for rule in RULES:
        for layout in ("TP2+SP", "PP2", "DP2"):
            yield Case(rule, layout=layout, variant=distributed)
    for layout in ("TP2+SP", "PP2", "DP2"):
        yield Case("gated-peri", layout=layout, variant="norms of Muse, distributed optimizer")
    yield Case("mix-ln", layout="PP2xVPP2", variant=distributed)
    yield Case("gated-peri", layout="TP2+SP", options="full recompute", variant=distributed)
    yield Case("peri", layout="TP2xPP2+SP", variant="muon")
    yield Case("peri", layout="DP2", variant="muon, distributed, bf16")
    for layout in ("CP2", "PP2xVPP2"):  # the middle stages need the mask of documents too
        yield Case("peri", layout=layout, variant="window, documents")


def _all_cases():
    """Every placement and model in every layout that Megatron accepts for it."""
    for placement in ("pre", "post", "peri", "output"):
        for architecture in ARCHITECTURES:
            for layout in LAYOUTS:
                if layout == "1" or ("EP" in layout and architecture != "moe"):
                    continue
                if (architecture, layout) in {("moe", "TP2"), ("mtp", "CP2"), ("states", "PP2xVPP2")}:
                    continue  # refused by Megatron; see "Known differences" in docs/parallelism.md
                yield Case(placement, architecture, layout, variant="distributed optimizer")
                overlap = ["overlap"] if layout in ("DP2", "EP2") else []  # elsewhere nothing is gathered
                for options in ("full recompute", "selective recompute", *overlap):
                    yield Case(placement, architecture, layout, options, "distributed optimizer")


CASES = list(_cases())
# Those whose statistics are compared, and those of them whose training is: monitored, each is run once.
MONITORED_CASES = [
    *(
        Case(placement, layout=layout)
        for placement in ("pre", "post", "output")
        for layout in ("TP2+SP", "PP2")
    ),
    *(Case("peri", layout=layout) for layout in ("TP2", "TP2+SP", "PP2", "PP2xVPP2", "CP2", "DP2")),
    Case("peri", options="full recompute"),
    Case("post", layout="TP2+SP", options="full recompute"),
    Case("peri", layout="DP2", variant="distributed optimizer"),
    Case("pre", layout="DP2", options="overlap", variant="distributed optimizer"),
    Case("peri", "biased", "TP2xPP2+SP"),
    Case("peri", "moe", "EP2", variant="distributed optimizer"),
    Case("pre", "moe", "EP2xTP2+SP", variant="distributed optimizer"),
    Case("peri", "mla", "TP2+SP"),
    Case("output", "mtp", "PP2"),
]
WATCHED = frozenset(MONITORED_CASES).intersection(CASES)
MORE_CASES = [case for case in _all_cases() if case not in CASES]
