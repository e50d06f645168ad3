"""Import what training needs, one after the other, and tell: in a process that may die of it.

``python -m megatron_periln.doctor.probe DEVICE [flags of pretraining]`` prints a line of JSON before
(``{"starts": name}``) and after each step.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_periln.errors import with_kind

__all__ = [
    "OF_TRANSFORMER_ENGINE",
    "ON_A_GPU",
    "STEPS",
    "checkpoint_bytes_per_parameter",
    "count_described_parameters",
]


def _torch(_: list[str]) -> dict[str, Any]:
    import torch  # the step: it may crash

    return {"version": torch.__version__}


def _cuda(_: list[str]) -> dict[str, Any]:
    import torch  # the step: it may crash

    if torch.version.cuda is None:
        raise RuntimeError("this torch was built without CUDA")
    torch.cuda.init()  # says why, where is_available() only says no
    return {"version": torch.version.cuda, "gpus": torch.cuda.device_count()}


def _nccl(_: list[str]) -> dict[str, Any]:
    import torch  # the step: it may crash

    return {"version": ".".join(map(str, torch.cuda.nccl.version()))}


def _gpus_compute(_: list[str]) -> dict[str, Any]:
    """Multiply on every GPU what has an exact result."""
    import torch  # the step: it may crash

    for index in range(torch.cuda.device_count()):
        ones = torch.ones(2048, 2048, device=f"cuda:{index}", dtype=torch.bfloat16)
        if not bool((ones @ ones == 2048).all()):
            raise RuntimeError(f"GPU {index} multiplies wrongly")
    return {"version": f"{torch.cuda.device_count()} multiply rightly"}


def _module(name: str) -> Callable[[list[str]], dict[str, Any]]:
    def load(_: list[str]) -> dict[str, Any]:
        module = importlib.import_module(name)
        version = getattr(module, "__version__", None)
        return {"version": version or importlib.metadata.version(name.split(".")[0].replace("_", "-"))}

    return load


def _cudnn(_: list[str]) -> dict[str, Any]:
    # Import torch, which may crash.
    from megatron_periln.cudnn import dotted, find_cudnn_mismatch, running_cudnn

    running, mismatch = running_cudnn(), find_cudnn_mismatch()
    if running is None:
        raise RuntimeError("torch has loaded none")
    warning = {} if mismatch is None else {"warning": mismatch.what, "advice": mismatch.remedy}
    return {"version": dotted(running), **warning}


def _engine_computes(flags: list[str]) -> dict[str, Any]:
    """Run Transformer Engine's layers on every GPU, both ways."""
    # Import torch and Transformer Engine, which may crash.
    import torch

    from megatron_periln.cudnn import find_cudnn_mismatch
    from megatron_periln.doctor.engine import Wanted, find_failure

    wanted = Wanted.by(flags)
    if wanted.local:
        return {"version": "not taken: --transformer-impl local"}
    for index in range(torch.cuda.device_count()):
        torch.cuda.set_device(index)
        if failure := find_failure(wanted, f"cuda:{index}"):
            mismatch = find_cudnn_mismatch()
            advice = {"advice": f"{mismatch.what}; {mismatch.remedy}"} if mismatch else {}
            return {"error": f"GPU {index}: {failure}", "missing": False, **advice}
    return {"version": f"forward and backward on {torch.cuda.device_count()} GPUs, {wanted}"}


def _megatron(_: list[str]) -> dict[str, Any]:
    """Import it; its ``__version__`` ends in the commit of whatever repository it is installed inside of."""
    importlib.import_module("megatron.core")
    return {"version": importlib.metadata.version("megatron-core")}


def _cpu(_: list[str]) -> dict[str, Any]:
    from megatron_periln import cpu  # the step: it may crash

    cpu.activate(hide_gpu=True)
    return {"version": "stands in for the GPU: --device cpu"}


def _parameters(flags: list[str]) -> dict[str, Any]:
    # Import Megatron, which may crash.
    from megatron_periln.megatron_arguments import megatron_arguments
    from megatron_periln.training.parsing import add_arguments

    args = megatron_arguments(flags, add_arguments, ignore_unknown=True)
    args.vocab_size = args.vocab_size or _vocabulary_of(args.data_path or [])
    return {
        "parameters": count_described_parameters(args),
        "bytes_each": checkpoint_bytes_per_parameter(args),
        "without": "" if args.padded_vocab_size or args.vocab_size else "its embeddings",
    }


def _vocabulary_of(data_path: list[str]) -> int | None:
    """Return the tokenizer's vocabulary size as the datasets' sidecars have it."""
    # Needs numpy, which may be broken.
    from megatron_periln.data.indexed.sidecar import Sidecar, is_sidecar, sidecar_path

    sidecars = (sidecar_path(word) for word in data_path)
    return next(
        (Sidecar.read_summary(path).tokenizer["vocab_size"] for path in sidecars if is_sidecar(path)), None
    )


def count_described_parameters(args: Namespace) -> int | None:
    """Return the parameters of the GPT that Megatron's arguments describe, parsed but not validated.

    Without embeddings if they give no vocabulary, which mock data has not; None where they don't say enough.
    Counted by Megatron's ``compute_weight_and_optimizer_memory``
    (megatron/training/theoretical_memory_usage.py); norms on outputs, and biases, are too few to matter.
    """
    # Megatron may crash.
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    vocabulary = args.padded_vocab_size or args.vocab_size or 0
    if not (args.num_layers and args.hidden_size and args.num_attention_heads):
        return None
    whole = Namespace(**vars(args))
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    whole.padded_vocab_size = -(-vocabulary // multiple) * multiple
    whole.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    gated = int(8 * args.hidden_size / 3 / 64) * 64
    whole.ffn_hidden_size = args.ffn_hidden_size or (gated if args.swiglu else 4 * args.hidden_size)
    whole.moe_ffn_hidden_size = args.moe_ffn_hidden_size or whole.ffn_hidden_size
    # One shard that holds everything, at a known number of bytes a parameter.
    whole.use_distributed_optimizer = False
    whole.world_size = whole.data_parallel_size = 1
    whole.pipeline_model_parallel_size = whole.tensor_model_parallel_size = 1
    whole.expert_model_parallel_size = whole.expert_tensor_parallel_size = 1
    return round(compute_weight_and_optimizer_memory(whole) / 18)


def checkpoint_bytes_per_parameter(args: Namespace) -> int:
    """Return the bytes in a checkpoint for each parameter: its weight, its fp32 master, Adam's moments."""
    half = args.bf16 or args.fp16
    weight = 2 if half else 4
    if args.no_save_optim:
        return weight
    sizes = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
    dtypes = (args.main_params_dtype, args.exp_avg_dtype, args.exp_avg_sq_dtype)
    master, *moments = (sizes[dtype] for dtype in dtypes) if args.use_precision_aware_optimizer else (4, 4, 4)
    return weight + sum(moments) + (master if half or args.use_distributed_optimizer else 0)


STEPS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "torch": _torch,
    "CUDA": _cuda,
    "NCCL": _nccl,
    "GPUs": _gpus_compute,
    "Transformer Engine": _module("transformer_engine.pytorch"),
    "cuDNN": _cudnn,
    "attention, norm, linear": _engine_computes,
    "Apex": _module("apex"),
    "CPU": _cpu,
    "megatron-core": _megatron,
    "parameters": _parameters,
}
OF_TRANSFORMER_ENGINE = ("cuDNN", "attention, norm, linear")
"""The steps that a broken or missing Transformer Engine leaves out."""

ON_A_GPU = ("CUDA", "NCCL", "GPUs", "Transformer Engine", *OF_TRANSFORMER_ENGINE, "Apex")
"""The steps that ``--device cpu`` skips; "CPU" is skipped otherwise."""


def _main(device: str, flags: list[str]) -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the packages print
    broken: set[str] = set()
    for name, step in STEPS.items():
        if name in (ON_A_GPU if device == "cpu" else ("CPU",)):
            continue
        if {"torch", "CUDA"} & broken and (name == "GPUs" or "torch" in broken):
            continue
        if name in OF_TRANSFORMER_ENGINE and {"CUDA", "Transformer Engine"} & broken:
            continue
        print(json.dumps({"starts": name}), file=answers, flush=True)
        try:
            answer = step(flags)
        except BaseException as error:  # argparse and broken packages exit too
            broken.add(name)
            missing = isinstance(error, ModuleNotFoundError) and "torch" not in broken
            answer = {"error": with_kind(error), "missing": missing}
        print(json.dumps({"name": name, **answer}), file=answers, flush=True)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
