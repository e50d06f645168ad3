"""What is wrong in megatron-core 0.19 on any device, and fixed in every process that trains.

Here are the fixes of single functions; those of the optimizers' state, of what loading a checkpoint runs and
of tokenizers have modules of their own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import megatron.core.datasets.helpers_cpp  # noqa: F401  # the compiled helpers, which must be there
import torch
from megatron.core import utils
from megatron.core.datasets import utils as dataset_utils
from megatron.core.tensor_parallel import layers, random
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.moe import upcycling_utils

from megatron_periln.patches import checkpoint_loading, optimizer_state, tokenizer_files
from megatron_periln.patches.registry import changes

__all__ = [
    "FIXES",
    "accumulate_weight_gradients_without_apex",
    "add_product",
    "apply",
    "checkpoint_without_output_off_fp8",
    "load_the_dense_model",
    "use_prebuilt_dataset_helpers",
]

_applied = False


def apply() -> None:
    """Apply all `FIXES`, once."""
    global _applied
    if _applied:
        return
    _applied = True
    for fix in FIXES:
        fix()


@changes(
    "megatron.core.datasets.utils.compile_helpers",
    why="it runs `make` in the package's folder and ends the process if that fails; the wheel ships "
    "the compiled module, and no Makefile",
    until="patches/test_fixes.py::test_upstream_still_cannot_compile_the_dataset_helpers_of_its_wheel",
)
def use_prebuilt_dataset_helpers() -> None:
    """Skip compiling the dataset helpers."""
    dataset_utils.compile_helpers = lambda: None


@changes(
    "megatron.core.tensor_parallel.random.CheckpointWithoutOutput.__init__",
    why="it tests `fp8 is not None`, so that False means FP8, which needs Transformer Engine: "
    "selective recomputation of norms fails without it. Where it is installed, that path is left as it is: "
    "what upstream recomputes in FP8 counts on it",
    until=(
        "patches/test_fixes.py::test_upstream_still_takes_false_for_fp8",
        "patches/test_fixes.py::test_upstream_still_cannot_recompute_norms_without_transformer_engine",
    ),
)
def checkpoint_without_output_off_fp8() -> None:
    """Keep ``CheckpointWithoutOutput(fp8=False)`` off the FP8 path, where there is no Transformer Engine."""
    init = CheckpointWithoutOutput.__init__

    def with_false_as_none(self: Any, fp8: Any = False, *more: Any, **options: Any) -> None:
        init(self, fp8 if random.HAVE_TE else fp8 or None, *more, **options)

    CheckpointWithoutOutput.__init__ = with_false_as_none


@changes(
    "megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda",
    "megatron.core.tensor_parallel.layers._grad_accum_fusion_available",
    "megatron.core.utils.fused_weight_gradient_mlp_cuda",
    why="`--gradient-accumulation-fusion`, Megatron's default, wants Apex in `ColumnParallelLinear`, "
    "which GPT's output layer is with Transformer Engine too",
    until="patches/test_fixes.py::test_upstream_still_needs_apex_to_accumulate_weight_gradients",
)
def accumulate_weight_gradients_without_apex() -> None:
    """Put `add_product` in the place of Apex's kernels.

    What they add to ``main_grad`` is one matrix product, which cuBLAS adds for torch as well.
    """
    if layers._grad_accum_fusion_available:
        return
    kernels = SimpleNamespace(wgrad_gemm_accum_fp32=add_product, wgrad_gemm_accum_fp16=add_product)
    layers.fused_weight_gradient_mlp_cuda = utils.fused_weight_gradient_mlp_cuda = kernels
    layers._grad_accum_fusion_available = True


def add_product(inputs: torch.Tensor, gradients: torch.Tensor, total: torch.Tensor) -> None:
    """Add ``gradients.t() @ inputs`` to ``total`` without rounding it to their dtype before.

    Parameters
    ----------
    inputs
        [tokens, inputs of the layer].
    gradients
        [tokens, outputs of the layer], of the same dtype.
    total
        [outputs of the layer, inputs of the layer], of that dtype or, on a GPU, fp32.
    """
    if total.dtype == inputs.dtype:
        total.addmm_(gradients.t(), inputs)
    else:
        torch.addmm(total, gradients.t(), inputs, out_dtype=total.dtype, out=total)


@changes(
    "megatron.core.transformer.moe.upcycling_utils.load_and_upcycle_model",
    why="`setup_model_and_optimizer` gives it the dense model under a name that `load_checkpoint` has no "
    "more, so that `--moe-use-upcycling` ends in a TypeError",
    until="patches/test_upcycling.py::test_upstream_still_loads_the_dense_model_under_another_name",
)
def load_the_dense_model() -> None:
    """Give ``load_checkpoint`` the dense model under the name that it has there."""
    original = upcycling_utils.load_and_upcycle_model

    def load_and_upcycle(*args: Any, load_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        renamed = {("ddp_model" if name == "model" else name): value for name, value in load_kwargs.items()}
        return original(*args, load_kwargs=renamed, **kwargs)

    upcycling_utils.load_and_upcycle_model = load_and_upcycle


FIXES = (
    use_prebuilt_dataset_helpers,
    checkpoint_without_output_off_fp8,
    accumulate_weight_gradients_without_apex,
    optimizer_state.materialize_adam_state,
    optimizer_state.keep_adam_steps_apart,
    optimizer_state.save_every_bucket_of_adam_state,
    optimizer_state.save_buckets_that_are_padding_here,
    optimizer_state.follow_another_schedule,
    optimizer_state.reshard_over_expert_parallelism,
    checkpoint_loading.restrict,
    checkpoint_loading.describe_tensors_without_strides,
    load_the_dense_model,
    tokenizer_files.read_vocabulary_files,
)
