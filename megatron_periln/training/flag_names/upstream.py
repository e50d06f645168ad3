"""Flags that Megatron-LM had before core 0.19, or has since, by the last version that knew them.

From the history of megatron/training/arguments.py, between core 0.4 and August 2026. For each flag, or for a
value of one (``--ckpt-format zarr``):

- words that start with ``--``: what to give instead, with the same values if it is a flag alone;
- "": it changes nothing here, and is accepted;
- other words: what to do, or what is lost.

A name that ends with ``*`` stands for all that begin with it.
"""

from __future__ import annotations

__all__ = ["NEWER", "UPSTREAM"]

_RL = "reinforcement learning is not part of pretraining"
_INFERENCE = "it belongs to inference, and does nothing in training; drop it"
_VISION = "it belongs to models of images, of which there are none here"
_MODELOPT = "it belongs to post-training with nvidia-modelopt; drop it to pretrain"
_RETRO = "retrieval (RETRO) is gone from megatron-core; without it this is another model"
_T5 = "it belongs to models of an encoder and a decoder, which are gone; drop it for a GPT"

UPSTREAM: dict[str, dict[str, str]] = {
    "core 0.18": {
        "--rl-generation-batch-size": _RL,
        "--rl-num-parallel-generation-batches": _RL,
        "--rl-num-parallel-generations": _RL,
        "--rl-parallel-generation-tasks": _RL,
    },
    "core 0.17": {
        "--inference-dynamic-batching-cuda-graph-max-tokens": _INFERENCE,
        "--muon-use-nesterov": "--muon-nesterov",
        "--no-scatter-gather-tensors-in-pipeline": "",
        "--tiktoken-special-tokens": "--tokenizer-special-tokens",
        "--tokenizer-hf-include-special-tokens": "",
        "--tokenizer-hf-use-fast": "",
        "--use-legacy-models": "every model is one of megatron-core's now, which computes the same "
        "function; drop "
        "it, and convert its checkpoints",
    },
    "core 0.16": {
        "--dataloader-seq-length": _VISION,
        "--decoder-tp-comm-overlap": _VISION,
        "--disable-chunked-prefill": _INFERENCE,
        "--disable-vision-class-token": _VISION,
        "--enable-gpt-oss": "",  # but in post-training, as the next
        "--export-force-local-attention": "",
        "--export-*": _MODELOPT,
        "--finetune-data-split": _MODELOPT,
        "--finetune-hf-dataset": _MODELOPT,
        "--freeze-LM": _VISION,
        "--freeze-ViT": _VISION,
        "--hybrid-attention-ratio": "give the layers as --hybrid-layer-pattern, as the older version "
        "printed them; "
        "without it this is another model",
        "--hybrid-mlp-ratio": "give the layers as --hybrid-layer-pattern, as the older version printed them; "
        "without it this is another model",
        "--inference-max-batch-size": _INFERENCE,
        "--langrl-*": _RL,
        "--legacy-tokenizer": "",
        "--local_rank": "",
        "--modelopt-enabled": _MODELOPT,
        "--rl-offload-kv-cache-during-training": _RL,
        "--rl-remove-kv-cache-during-training": _RL,
        "--rl-reset-cuda-graphs": _RL,
        "--use-packed-sequence": _VISION,
    },
    "core 0.15": {
        "--ckpt-convert-format zarr": "--ckpt-convert-format torch_dist",
        "--ckpt-format zarr": "zarr checkpoints are gone: give --ckpt-format torch_dist, and convert with "
        "that version "
        "what is to be loaded",
        "--grpo-default-temperature": _RL,
        "--grpo-default-top-p": _RL,
        "--inference-dynamic-batching-*": _INFERENCE,
        "--moe-extended-tp": "give --expert-tensor-parallel-size, the tensor times the expert parallel "
        "size, and "
        "--expert-model-parallel-size 1",
        "--moe-use-legacy-grouped-gemm": "",
        "--no-async-tensor-model-parallel-allreduce": "",
        "--retriever-seq-length": _RETRO,
        "--retro-*": _RETRO,
        "--rl-calculate-intra-group-similarity": _RL,
        "--rl-sequence-packing-bin-size": _RL,
        "--teacher-model-config": _MODELOPT,
    },
    "core 0.14": {
        "--load-model-opt-format": _MODELOPT,
    },
    "core 0.13": {
        "--encoder-pipeline-model-parallel-size": _T5,
        "--encoder-tensor-model-parallel-size": _T5,
        "--keep-fp8-transpose-cache-when-using-custom-fsdp": "--keep-fp8-transpose-cache",
        "--pipeline-model-parallel-split-rank": _T5,
        "--use-custom-fsdp": "--use-megatron-fsdp",
    },
    "core 0.12": {
        "--moe-token-dispatcher-type alltoall_seq": "--moe-token-dispatcher-type alltoall",
        "--s3-cache-path": "--object-storage-cache-path",
    },
    "core 0.10": {
        "--renormalize-blend-weights": "",
        "--standalone-embedding-stage": "give --pipeline-model-parallel-layout with a first stage of E alone",
    },
    "core 0.8": {
        "--delay-param-gather": "",
        "--drop-vision-class-token": _VISION,
        "--log-batch-size-to-tensorboard": "",
        "--no-delay-grad-reduce": "--no-align-grad-reduce",
        "--no-log-learnig-rate-to-tensorboard": "the learning rate is always logged; drop it",
        "--tokenizer-type Llama3Tokenizer": "give --tokenizer-type HuggingFaceTokenizer and its folder",
        "--tokenizer-type MistralTokenizer": "give --tokenizer-type HuggingFaceTokenizer and its folder",
    },
    "core 0.7": {
        "--ammo-*": _MODELOPT,
        "--enable-one-logger": "",
        "--one-logger-entity": "",
    },
    "core 0.6": {
        "--moe-token-dropping": "give --moe-expert-capacity-factor",
    },
    "2023": {
        "--DDP-impl": "",
        "--data-impl": "datasets are memory-mapped (mmap); drop it",
        "--embedding-weights-in-fp32": "megatron-core keeps embeddings in the model's dtype; drop it",
        "--expert-parallel": "--expert-model-parallel-size",
        "--fp8-e4m3": "--fp8-format e4m3",
        "--fp8-hybrid": "--fp8-format hybrid",
        "--layernorm-epsilon": "--norm-epsilon",
        "--mmap-warmup": "",
        "--model-spec": "--spec",
        "--no-contiguous-buffers-in-local-ddp": "",
        "--no-query-key-layer-scaling": "",
        "--overlap-p2p-communication": "",
    },
    "2022": {
        "--activations-checkpoint-method": "--recompute-method",
        "--activations-checkpoint-num-layers": "--recompute-num-layers",
        "--checkpoint-num-layers": "--recompute-num-layers",
        "--distribute-checkpointed-activations": "--distribute-saved-activations",
        "--override-lr-scheduler": "--override-opt_param-scheduler",
        "--use-checkpoint-lr-scheduler": "--use-checkpoint-opt_param-scheduler",
    },
    "2021": {
        "--bias-dropout-fusion": "",
        "--bias-gelu-fusion": "",
        "--fp32-allreduce": "--accumulate-allreduce-grads-in-fp32",
        "--min-scale": "--min-loss-scale",
        "--scaled-masked-softmax-fusion": "",
        "--scaled-upper-triang-masked-softmax-fusion": "",
        "--use-contiguous-buffers-in-ddp": "",
    },
    "its main or dev branch, between releases": {
        "--align-param-gather": "",
        "--fallback-to-eager-attn": "give --attention-backend unfused",
        "--initialize-socket-comms": "",
        "--linear-attention-type": "--experimental-attention-variant",
        "--linear-attention-type mamba": "give Mamba layers as --hybrid-layer-pattern",
        "--max-seqlen-per-cp-rank": "sequences are not packed in pretraining; drop it",
        "--moe-enable-hybridep": "--moe-flex-dispatcher-backend hybridep",
        "--moe-router-padding-for-quant": "--moe-router-padding-for-quantization",
        "--moe-router-topk-limited-devices": "give --moe-router-num-groups, the expert parallel size, and "
        "its number "
        "as --moe-router-group-topk; without them experts are chosen otherwise",
        "--muon-no-use-nesterov": "",
        "--no-weight-decay-cond-type qwen3_next": "--apply-wd-to-qk-layernorm",
        "--use-gpu-initialization": "",
    },
}

NEWER: dict[str, str] = {
    "--attn-chunk-size": "attention within chunks is no part of this version, and --window-size slides: "
    "without it this is another model",
    "--batch-invariant-backend": "--batch-invariant-mode has its own kernels; drop it",
    "--beta-fast": "--yarn-beta-fast",
    "--beta-slow": "--yarn-beta-slow",
    "--chunked-optimizer-state-offload": "give --optimizer-cpu-offload to save memory, or drop it",
    "--ckpt-drop-redundant-extra-state": "it saves space; drop it",
    "--ckpt-fully-parallel-load-per-rank-objects": "it saves time; drop it",
    "--ckpt-pg-tensors-cache-create": "it saves time; drop it",
    "--ckpt-pg-tensors-cache-path": "it saves time; drop it",
    "--cp-partition-mode": "sequences are split as megatron-core 0.19 does; drop it",
    "--cross-entropy-fusion-impl linear": "--cross-entropy-fusion-impl native",
    "--csa-*": "compressed sparse attention is no part of this version; without it this is another model",
    "--disable-save-tokenizer-assets": "",
    "--dynamic-context-parallel": "sequences are not packed in pretraining; drop it",
    "--enable-hyper-connections": "hyper-connections are no part of this version; without them this is "
    "another model",
    "--enable-mhc-connections": "hyper-connections are no part of this version; without them this is "
    "another model",
    "--experimental-attention-variant dsv4_hybrid": "this version has gated_delta_net and dsa: another model",
    "--experimental-attention-variant gdn": "--experimental-attention-variant gated_delta_net",
    "--experimental-attention-variant gdn2": "this version has gated_delta_net and dsa: another model",
    "--gdn-*": "it makes a gated delta net faster; drop it",
    "--head-wise-attn-gate": "--attention-output-gate gates each element; without either this is another "
    "model",
    "--linear-cp-mode": "a gated delta net takes one way of context parallelism here; drop it",
    "--log-moe-overload-factor": "it only logs; drop it",
    "--mhc-*": "hyper-connections are no part of this version; without them this is another model",
    "--megatron-fsdp-version": "this version has the first; drop it",
    "--moe-combine-bwd-dtype": "tokens are exchanged in the dtype of the model; drop it",
    "--moe-dispatch-fwd-dtype": "tokens are exchanged in the dtype of the model; drop it",
    "--moe-flex-dispatcher-backend deepepv2": "--moe-flex-dispatcher-backend deepep",
    "--moe-n-hash-layers": "routing by hash is no part of this version; without it this is another model",
    "--moe-use-grouped-tensor": "it saves time; drop it",
    "--mtp-hsm": "this version does not mix hidden states; without it this is another model",
    "--muon-use-syrk": "it saves time; drop it",
    "--no-dsa-kernel-fusion": "",
    "--no-save-tokenizer-assets": "",
    "--num-residual-streams": "hyper-connections are no part of this version; without them this is another "
    "model",
    "--o-groups": "grouped output projections are no part of this version; without them this is another "
    "model",
    "--o-lora-rank": "low-rank output projections are no part of this version; without them this is another "
    "model",
    "--offload-optimizer-states": "give --optimizer-cpu-offload to save memory, or drop it",
    "--original-max-position-embeddings": "--yarn-original-max-position-embeddings",
    "--otel-*": "it only logs; drop it",
    "--output-logit-dtype": "logits have the dtype of the model; drop it",
    "--rl-durable-rollout-bank": _RL,
    "--rl-max-inflight-requests": _RL,
    "--rl-rollout-bank-dir": _RL,
    "--rl-rollout-bank-max-bytes": _RL,
    "--rotary-base-per-layer": "all layers have one --rotary-base here; without it this is another model",
    "--sequence-packing-scheduler": "sequences are not packed in pretraining; drop it",
    "--sft-*": "fine-tuning is not part of pretraining",
    "--use-fused-mhc": "hyper-connections are no part of this version; without them this is another model",
    "--use-gigatoken": "tools/preprocess_data.py uses it by itself; drop it",
    "--use-varlen-dataset": "sequences are not packed in pretraining",
    "--varlen-*": "sequences are not packed in pretraining",
    "--yarn-mscale": "--mscale",
    "--yarn-mscale-all-dim": "--mscale-all-dim",
}
"""Of the main or dev branch of August 2026, and not in core 0.19."""
