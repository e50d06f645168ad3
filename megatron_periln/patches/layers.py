"""Faults of megatron-core 0.19 in its datasets and layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["FIXES", "add_product"]


def use_prebuilt_dataset_helpers() -> None:
    """Skip compiling the dataset helpers.

    ``compile_helpers`` (megatron/core/datasets/utils.py) runs ``make`` in the package's folder and
    exits the process if that fails. The wheel ships the compiled module, and no Makefile.
    """
    import megatron.core.datasets.helpers_cpp  # noqa: F401
    import megatron.core.datasets.utils as utils

    utils.compile_helpers = lambda: None


def checkpoint_without_output_off_fp8() -> None:
    """Keep ``CheckpointWithoutOutput(fp8=False)`` off the FP8 path.

    It tests ``fp8 is not None`` (megatron/core/tensor_parallel/random.py), so False means FP8,
    which needs Transformer Engine: selective recomputation of norms fails without it.
    """
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    init = CheckpointWithoutOutput.__init__

    def with_false_as_none(self: Any, fp8: Any = None) -> None:
        init(self, fp8 or None)

    CheckpointWithoutOutput.__init__ = with_false_as_none


def accumulate_weight_gradients_without_apex() -> None:
    """Let ``--gradient-accumulation-fusion``, which is Megatron's default, do without Apex.

    ``ColumnParallelLinear`` (megatron/core/tensor_parallel/layers.py), which GPT's output layer is
    with Transformer Engine too, refuses it without Apex's ``fused_weight_gradient_mlp_cuda``. What
    that adds to ``main_grad`` is one matrix product, which cuBLAS adds for torch as well.
    """
    from megatron.core import utils
    from megatron.core.tensor_parallel import layers

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


FIXES = (
    use_prebuilt_dataset_helpers,
    checkpoint_without_output_off_fp8,
    accumulate_weight_gradients_without_apex,
)
