"""Each fix of a single function: the failure without it, and none with it.

A test named ``upstream_still_...`` fails once upstream has fixed it.
"""

from functools import partial

import pytest
import torch

from megatron_periln.patches import fixes
from tests.cpu import fresh
from tests.patches.applied import with_fixes, without_fixes


def test_all_fixes_are_applied_once():
    called, expected = fresh.call(what_apply_calls)
    assert called == expected
    assert len(expected) > 5


def what_apply_calls():
    """Return the fixes that two calls of ``apply`` apply, and those there are."""
    called, expected = [], [fix.__name__ for fix in fixes.FIXES]
    fixes.FIXES = [partial(called.append, name) for name in expected]
    fixes.apply()
    fixes.apply()
    return called, expected


# The dataset helpers.


def compile_dataset_helpers():
    from megatron.core.datasets import helpers, utils

    utils.compile_helpers()
    return callable(helpers.build_sample_idx)


def test_upstream_still_cannot_compile_the_dataset_helpers_of_its_wheel():
    with pytest.raises(fresh.CallError, match=r"SystemExit: 1|FileNotFoundError"):
        without_fixes(compile_dataset_helpers)


def test_dataset_helpers_come_compiled():
    assert with_fixes(["use_prebuilt_dataset_helpers"], compile_dataset_helpers)


# Recomputation without FP8.


def takes_the_fp8_path(fp8):
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    return CheckpointWithoutOutput(**fp8).fp8


def recompute_without_fp8():
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    x = torch.ones(2, requires_grad=True)
    return CheckpointWithoutOutput().checkpoint(torch.exp, x).requires_grad


@pytest.mark.parametrize("fp8", [{}, {"fp8": False}])
def test_upstream_still_takes_false_for_fp8(fp8):
    assert without_fixes(takes_the_fp8_path, fp8)


def test_upstream_still_cannot_recompute_norms_without_transformer_engine():
    with pytest.raises(fresh.CallError, match="FP8GlobalStateManager"):
        without_fixes(recompute_without_fp8)


@pytest.mark.parametrize(
    "fp8, takes_it", [({}, False), ({"fp8": False}, False), ({"fp8": None}, False), ({"fp8": "hybrid"}, True)]
)
def test_only_fp8_takes_the_fp8_path(fp8, takes_it):
    assert with_fixes(["checkpoint_without_output_off_fp8"], takes_the_fp8_path, fp8) is takes_it


def takes_the_fp8_path_with_transformer_engine(fp8):
    from megatron.core.tensor_parallel import random

    random.HAVE_TE = True
    return takes_the_fp8_path(fp8)


@pytest.mark.parametrize("fp8", [{}, {"fp8": False}, {"fp8": None}, {"fp8": "hybrid"}])
def test_with_transformer_engine_all_is_as_upstream_has_it(fp8):
    fixed = with_fixes(["checkpoint_without_output_off_fp8"], takes_the_fp8_path_with_transformer_engine, fp8)
    assert fixed is without_fixes(takes_the_fp8_path, fp8)


def what_arrives(given):
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    arrived = {}
    CheckpointWithoutOutput.__init__ = lambda self, fp8=False, **more: arrived.update(fp8=fp8, **more)
    fixes.checkpoint_without_output_off_fp8()
    CheckpointWithoutOutput(**given)
    return arrived


def test_other_arguments_arrive():
    """Megatron's next version has more of them."""
    more = {"ckpt_manager": "one", "retain_input_tensors": True}
    assert without_fixes(what_arrives, more) == {"fp8": None, **more}


def test_norms_are_recomputed_without_transformer_engine():
    assert with_fixes(["checkpoint_without_output_off_fp8"], recompute_without_fp8)


# The fusion of the accumulation of weight gradients, without Apex.


def accumulated_weight_gradient(fusion):
    """Return a linear layer's gradient of two batches: where it accumulates, and its error to fp64's."""
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    config = ModelParallelConfig(
        use_cpu_initialization=True, gradient_accumulation_fusion=fusion, params_dtype=torch.float32
    )
    layer = ColumnParallelLinear(
        8, 12, config=config, init_method=torch.nn.init.normal_, bias=False, gather_output=False
    )
    layer.weight.main_grad = torch.zeros_like(layer.weight)
    expected = torch.zeros(12, 8, dtype=torch.float64)
    for seed in (1, 2):
        batch = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(seed))
        output, _ = layer(batch.requires_grad_())
        output.pow(2).sum().backward()
        expected += (2 * output.detach().double()).flatten(0, 1).t() @ batch.detach().double().flatten(0, 1)
    accumulated = layer.weight.main_grad if fusion else layer.weight.grad
    return ((accumulated.double() - expected).norm() / expected.norm()).item()


def test_upstream_still_needs_apex_to_accumulate_weight_gradients():
    with pytest.raises(fresh.CallError, match="fused_weight_gradient_mlp_cuda"):
        without_fixes(accumulated_weight_gradient, True)


def test_weight_gradients_accumulate_without_apex():
    assert without_fixes(accumulated_weight_gradient, False) < 1e-6
    assert with_fixes(["accumulate_weight_gradients_without_apex"], accumulated_weight_gradient, True) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_has_the_product_that_a_gpu_adds_in_fp32(dtype):
    """On torch's meta device, which has the shapes and dtypes of a GPU's operations and no values."""
    inputs, gradients = (torch.empty(10, n, dtype=dtype, device="meta") for n in (8, 12))
    total = torch.empty(12, 8, device="meta")
    fixes.add_product(inputs, gradients, total)
    with pytest.raises(RuntimeError):
        fixes.add_product(inputs, gradients[:9], total)
