"""Flags of Megatron's forks, by fork; the advice is as in `upstream`.

From their arguments.py: swiss-ai at 81d44dbe, llm-jp at ea80de79, ROCm at 2b855baf, Habana at 13c28dea,
DeepSpeed at 4efb479d, Pai at a098ca5. Of bigscience's and GPT-NeoX: what launch scripts give.
"""

from __future__ import annotations

__all__ = ["FORKS", "NO_NEED"]

_ACTIVATION = (
    "megatron-core has no such activation, and with another this is another model: train with that fork"
)
_ADEMAMIX = "megatron-core has no AdEMAMix: give --optimizer adam, or muon, and rates that fit it"
_GOLDFISH = "tokens are not dropped from the loss here: training is another without it"
_ZERO = "give --use-distributed-optimizer, which shards as ZeRO 1, or --use-megatron-fsdp, as ZeRO 3"
_CAPACITY = "give --moe-expert-capacity-factor"
NO_NEED = "it makes that fork faster, or saves memory, and does not change what is computed"
_KILL_SWITCH = "give --exit-signal-handler, by which a signal saves and ends a run, or drop it"
_LOGS = "it only logs; drop it, --monitor-layers records statistics"
_VISION = "it belongs to models of images, of which there are none here"
_GENERATION = "it belongs to generation and evaluation of text; drop it"
_SFT = "it belongs to fine-tuning; drop it to pretrain"
_DISTILLATION = "distillation is not part of pretraining"
_TEMPERED = (
    "the schedule counts iterations or samples: give --lr-decay-samples, --lr-warmup-samples, --train-samples"
)
_INDEX = "indices of the data are built and cached, by --data-cache-path; drop it"

FORKS: dict[str, dict[str, str]] = {
    "swiss-ai's fork (Apertus)": {
        "--ademamix-alpha": _ADEMAMIX,
        "--ademamix-alpha-warmup": _ADEMAMIX,
        "--ademamix-beta3": _ADEMAMIX,
        "--ademamix-beta3-warmup": _ADEMAMIX,
        "--goldfish-h": _GOLDFISH,
        "--goldfish-k": _GOLDFISH,
        "--goldfish-loss": _GOLDFISH,
        "--input-embeddings-multiplier": "give --use-mup and --mup-embedding-mult, which scale by width "
        "too; without "
        "it this is another model",
        "--layernorm-init": "norms start at one here, output norms as --output-norm-init says",
        "--log-params-norm-per-param": _LOGS,
        "--lr-wsd-decay-style 1-sqrt": "--lr-wsd-decay-style minus_sqrt",
        "--no-attn-layernorm": "--norm-placement says where norms stand; at least one stands at each "
        "sublayer",
        "--no-final-layernorm": "--norm-placement post has no final norm, all others have",
        "--no-mlp-layernorm": "--norm-placement says where norms stand; at least one stands at each sublayer",
        "--optimizer ademamix": _ADEMAMIX,
        "--post-layer-norm": "--norm-placement output",
        "--qknorm-impl": "",
        "--trigger-path": "give --exit-signal-handler, by which a signal saves and ends a run, or drop it",
        "--xielu": _ACTIVATION,
        "--xiprelu": _ACTIVATION,
        "--xiprelup": _ACTIVATION,
    },
    "bigscience's fork (BLOOM)": {
        "--abort-on-unmet-fused-kernel-constraints": "",
        "--codecarbon-dir": "it only logs; drop it",
        "--embed-layernorm": "--embedding-norm",
        "--glu-activation": "give --swiglu; with another activation this is another model",
        "--glu-activation swiglu": "--swiglu",
        "--inference": _GENERATION,
        "--kill-switch-path": _KILL_SWITCH,
        "--log-level-replica": "it only logs; drop it",
        "--pad-vocab-size-to": "--padded-vocab-size",
        "--position-embedding-type alibi": "there is no ALiBi in megatron-core, and with another position "
        "embedding this is another model",
        "--position-embedding-type rotary": "--position-embedding-type rope",
        "--pp-partition-method": "give --pipeline-model-parallel-layout, or drop it",
        "--sync-tp-duplicated-parameters": "",
        "--tokenizer-name-or-path": "--tokenizer-model",
        "--tokenizer-type PretrainedFromHF": "--tokenizer-type HuggingFaceTokenizer",
        "--train-weighted-split-paths*": "give --train-data-path, with a weight before each",
        "--valid-weighted-split-paths*": "give --valid-data-path, with a weight before each",
    },
    "GPT-NeoX": {
        "--pipe-parallel-size": "--pipeline-model-parallel-size",
        "--pos-emb": "give --position-embedding-type",
        "--pos-emb rotary": "--position-embedding-type rope",
        "--pos-emb learned": "--position-embedding-type learned_absolute",
    },
    "llm-jp's fork": {
        "--use-mpi": "",
        "--z-loss-strength": "the loss has no z-loss here: training is another without it",
    },
    "ROCm's fork": {
        "--disable-te-fused-rope": "--no-rope-fusion",
    },
    "Habana's fork": {
        "--allow-unspec-int-on-nn-module": NO_NEED,
        "--apply-norm-post-sub-block": "--norm-placement output",
        "--attention-per-layer-logging": _LOGS,
        "--attention-z-loss-coeff": "attention has no z-loss here: training is another without it",
        "--cache-fp8-weight": NO_NEED,
        "--cache-fp8-weight-fwd": NO_NEED,
        "--cache-size-limit": NO_NEED,
        "--compile-from-sec-mini-batch": NO_NEED,
        "--fp8-amax-reduce": "amax is reduced by default; drop it",
        "--fp8-coverage": "all linear layers of Transformer Engine compute in FP8; drop it",
        "--fp8-format e5m2": "--fp8-format hybrid",
        "--fp8-smooth-swiglu": "Transformer Engine has none: FP8 is rounded otherwise without it",
        "--kill-switch-file": _KILL_SWITCH,
        "--load-distrib-optimizer-method": "",
        "--micro-batch-sync-interval": NO_NEED,
        "--moe-capacity-bins-*": NO_NEED,
        "--moe-configured-bins": NO_NEED,
        "--moe-dynamic-hpu": NO_NEED,
        "--moe-fused-weights": NO_NEED,
        "--moe-permuted-weights": NO_NEED,
        "--moe-router-fp32": "--moe-router-dtype fp32",
        "--moe-token-distribution-logging*": "it only logs; drop it, --moe-per-layer-logging logs the "
        "losses of routers",
        "--no-load-strict": "give --dist-ckpt-strictness log_all",
        "--optimizer fusedadamw": "--optimizer adam",
        "--profile-type": "give --profile and --use-pytorch-profiler",
        "--save-distrib-optimizer-method": "",
        "--shuffle-each-epoch-separately": "megatron-core shuffles the last epoch by itself, all others "
        "together; "
        "drop it",
        "--torch-compile-dynamic": NO_NEED,
        "--use-fast-softmax": NO_NEED,
        "--use-fused-rmsnorm": NO_NEED,
        "--use-fused-sdpa": NO_NEED,
        "--use-fused-sdpa-with-recompute": NO_NEED,
        "--use-regional-compilation": NO_NEED,
        "--use-te-custom-op": NO_NEED,
        "--use-torch-compile": NO_NEED,
        "--use-torch-compiled-autograd": NO_NEED,
        "--verify-checkpoint": "--checkpoint-verify full",
        "--verify-checkpoint-model-type": "",
    },
    "Pai-Megatron-Patch": {
        "--adaptive-seq-len": _GENERATION,
        "--attention-head-type": "give --group-query-attention and --num-query-groups 1 for multiquery",
        "--convert-checkpoint-from-megatron-to-transformers": "tools/export_hf.py and tools/import_hf.py "
        "convert; "
        "drop it",
        "--cpu-offloading": "give --cpu-offloading-num-layers alone",
        "--data-dir": _SFT,
        "--dataset MMAP": "",
        "--dataset": "--data-path names indexed datasets (MMAP), which tools/preprocess_data.py makes; drop "
        "it",
        "--disable-bias-attn-fc": "--disable-bias-linear drops all biases, --add-qkv-bias keeps those of "
        "queries, keys "
        "and values; without it this is another model",
        "--disable-bias-linear-fc": "--disable-bias-linear drops all biases, --add-qkv-bias keeps those of "
        "queries, "
        "keys and values; without it this is another model",
        "--disable-parallel-output": _GENERATION,
        "--embed-layernorm": "--embedding-norm",
        "--enable-shared-expert": "give --moe-shared-expert-intermediate-size",
        "--epochs": _SFT,
        "--eval-dev": _GENERATION,
        "--eval-fp32": _GENERATION,
        "--extra-vocab-size": "give --padded-vocab-size, the tokenizer's ids and so many more",
        "--generation-length": _GENERATION,
        "--glu-activation": "give --swiglu",
        "--image-*": _VISION,
        "--input-len": _GENERATION,
        "--intermediate-size": "--ffn-hidden-size",
        "--keep-last": _SFT,
        "--max-padding-length": "",
        "--mm-*": _VISION,
        "--moe": "give --num-experts",
        "--moe-expert-parallel-size": "--expert-model-parallel-size",
        "--moe-topk": "--moe-router-topk",
        "--n-head-kv": "give --group-query-attention and --num-query-groups",
        "--num-fewshot": _GENERATION,
        "--num-shared-experts": "give --moe-shared-expert-intermediate-size, of all shared experts together",
        "--optimizer hybridadam": "give --optimizer adam and --optimizer-cpu-offload",
        "--optimizer-offload-auto-threshold": "give --optimizer-cpu-offload and --optimizer-offload-fraction",
        "--optimizer-offload-chunk-size": "give --optimizer-cpu-offload and --optimizer-offload-fraction",
        "--optimizer-offload-policy": "give --optimizer-cpu-offload and --optimizer-offload-fraction",
        "--out-seq-length": _GENERATION,
        "--patch-tokenizer-type": "give --tokenizer-type HuggingFaceTokenizer and --tokenizer-model, the "
        "folder of the "
        "model that --load named",
        "--position-encoding-2d": "megatron-core has no such positions; without it this is another model",
        "--qk-nope-head-dim": "--qk-head-dim",
        "--qk-rope-head-dim": "--qk-pos-emb-head-dim",
        "--repetition-penalty": _GENERATION,
        "--repetition_penalty": _GENERATION,
        "--rotary-scale-factor": "give --rotary-scaling-factor with --rope-type yarn, or --use-rope-scaling",
        "--router-type": "tokens choose their --moe-router-topk experts, and experts choose none; drop it "
        "if it says topk",
        "--shared-moe-ffn-hidden-size": "--moe-shared-expert-intermediate-size",
        "--sliding-window": "give --window-size",
        "--source-seq-len": _SFT,
        "--target-seq-len": _SFT,
        "--task-list": _GENERATION,
        "--text-generate-*": _GENERATION,
        "--top-k": _GENERATION,
        "--top-p": _GENERATION,
        "--train-data": "--data-path names indexed datasets, which tools/preprocess_data.py makes",
        "--train-mode pretrain": "",
        "--train-mode": "this is pretraining; drop it if it says pretrain",
        "--transformer-timers": "",
        "--transformer-type": "",
        "--use-alibi-mask": "megatron-core has no ALiBi; without it this is another model",
        "--use-llama2-rotary-position-embeddings": "--position-embedding-type rope",
        "--use-mistral-rotary-position-embeddings": "--position-embedding-type rope",
        "--use-normhead": "megatron-core does not normalize the output's weights; without it this is "
        "another model",
        "--valid-data": "--valid-data-path names indexed datasets, which tools/preprocess_data.py makes",
        "--verbosity": "",
        "--vision-*": _VISION,
        "--z-loss-weight": "the loss has no z-loss here: training is another without it",
    },
    "Megatron-DeepSpeed": {
        "--aml-data-download-path": "",
        "--checkpoint-in-cpu": "give --cpu-offloading-num-layers, or drop it",
        "--contigious-checkpointing": NO_NEED,
        "--cpu-optimizer": "give --optimizer-cpu-offload, or drop it",
        "--cpu_torch_adam": "give --optimizer-cpu-offload and --use-torch-optimizer-for-cpu-offload, or "
        "drop it",
        "--create-moe-param-group": "",
        "--data-efficiency-curriculum-learning": "data have one order here: training is another without it",
        "--deepspeed": _ZERO,
        "--deepspeed-activation-checkpointing": "give --recompute-activations, or drop it",
        "--deepspeed_config": _ZERO,
        "--disable-mem-efficient-ln": "",
        "--disable-moe-token-dropping": "no token is dropped without --moe-expert-capacity-factor; drop it",
        "--disable-moe-top2-2nd-expert-sampling": "experts are chosen without sampling; drop it",
        "--distributed-backend ccl": "--distributed-backend nccl",
        "--distributed-backend hccl": "--distributed-backend nccl",
        "--ds-inference": _GENERATION,
        "--ds-sequence-parallel-*": "give --context-parallel-size and --cp-comm-type a2a",
        "--ds_fused_adam": "--optimizer adam",
        "--enable-expert-tensor-parallelism": "give --expert-tensor-parallel-size",
        "--enable-zbh1-*": NO_NEED,
        "--expert-interval": "give --moe-layer-freq as a pattern: as a number it begins with experts, there "
        "they came last",
        "--force-ds-sequence-parallel": "give --context-parallel-size and --cp-comm-type a2a",
        "--hidden-size-teacher": _DISTILLATION,
        "--kd*": _DISTILLATION,
        "--kill-switch-file": "give --exit-signal-handler, by which a signal saves and ends a run, or drop "
        "it",
        "--load-tag": "give --ckpt-step, its number",
        "--load-teacher": _DISTILLATION,
        "--log-optimizer-states-to-tensorboard": _LOGS,
        "--lr-decay-tokens": _TEMPERED,
        "--lr-warmup-tokens": _TEMPERED,
        "--memory-centric-tiled-linear": NO_NEED,
        "--mlp-type": "experts with a dense MLP beside them: give --moe-shared-expert-intermediate-size; "
        "without it "
        "this is another model",
        "--moe-eval-capacity-factor": _CAPACITY,
        "--moe-expert-parallel-size": "--expert-model-parallel-size",
        "--moe-loss-coeff": "give --moe-aux-loss-coeff",
        "--moe-min-capacity": _CAPACITY,
        "--moe-train-capacity-factor": "--moe-expert-capacity-factor",
        "--mos": _DISTILLATION,
        "--no-load-lr-state": "give --override-opt_param-scheduler",
        "--no-pipeline-parallel": "",
        "--normalization layernorm": "--normalization LayerNorm",
        "--normalization rmsnorm": "--normalization RMSNorm",
        "--num-attention-heads-teacher": _DISTILLATION,
        "--num-experts-switch": "give --num-experts and --moe-router-topk 1",
        "--num-experts-teacher": _DISTILLATION,
        "--num-key-value-heads": "give --group-query-attention and --num-query-groups",
        "--num-layers-teacher": _DISTILLATION,
        "--partition-activations": "give --distribute-saved-activations, with --recompute-granularity full",
        "--profile-backward": "give --profile",
        "--profile_steps": "give --profile, --profile-step-start and --profile-step-end",
        "--random-ltd": "tokens are not dropped from layers here: training is another without it",
        "--remote-device": _ZERO,
        "--repeated-dataloader": "data are repeated as often as --train-iters needs; drop it",
        "--reset-iteration": "give --finetune, which does not load the optimizer either",
        "--return-data-index": "",
        "--rotary-position-embeddings-theta": "--rotary-base",
        "--scattered-embeddings": NO_NEED,
        "--split-transformers": NO_NEED,
        "--synchronize-each-layer": NO_NEED,
        "--tile-factor": NO_NEED,
        "--tokenizer-type HFTokenizer": "--tokenizer-type HuggingFaceTokenizer",
        "--topk": "--moe-router-topk",
        "--train-data-exact-num-epochs": "give --train-samples",
        "--train-desc-path": _INDEX,
        "--train-doc-idx-path": _INDEX,
        "--train-idx-path": _INDEX,
        "--train-sample-idx-path": _INDEX,
        "--train-shuffle-idx-path": _INDEX,
        "--train-tokens": _TEMPERED,
        "--universal-checkpoint": "checkpoints load in any layout; drop it",
        "--use-dataset-only": "",
        "--use-flash-attn-*": "--attention-backend flash insists on FlashAttention; drop it",
        "--use-pin-memory": NO_NEED,
        "--use-tutel": NO_NEED,
        "--zero-*": _ZERO,
    },
}
