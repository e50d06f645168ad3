"""What benchmarks/step.py makes of its measurements."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def step():
    """Return the benchmark as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("benchmark_of_steps", BENCHMARKS / "step.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


# Names that a profiler gave on an H100.
NORM_SIDE = [
    "norm_add_backward",
    "sum_partials",
    "triton_poi_fused_add_0",
    "void transformer_engine::normalization::rmsnorm_bwd_tuned_kernel<transformer_engine::norma",
    "void at::native::unrolled_elementwise_kernel<at::native::CUDAFunctor_add<float>, std::arra",
    "triton_poi_fused_add_cat_mul_rsub_sigmoid_silu_split_0",
    "void transformer_engine::fused_rope_backward_kernel<__nv_bfloat16>(__nv_bfloat16 const*, i",
]
OTHER_SIDE = [
    "nvjet_sm90_tss_256x128_64x4_1x2_h_badd_coopA_NTT",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x4x1_cga1x1",
    "void multi_tensor_apply_kernel<AdamFunctor>",
    "aten::bmm",
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL",
]


def test_kernels_are_told_apart_by_their_names(step):
    assert [name for name in NORM_SIDE + OTHER_SIDE if step.is_norm_side(name)] == NORM_SIDE


@pytest.mark.parametrize(
    ("spans", "length"),
    [([], 0.0), ([(0, 2), (1, 3)], 3.0), ([(5, 6), (0, 2)], 3.0), ([(0, 9), (2, 3), (8, 10)], 10.0)],
)
def test_kernels_that_overlap_count_once(step, spans, length):
    assert step.covered(spans) == length


def test_the_clock_s_drift_is_no_cost_of_a_norm(step):
    # GEMMs take 1 % more in the second variant's steps; its norms 2 ms more, of the 100 that the GPU works.
    first = [step.Sample(200.0, 180.0, 100.0, 20.0, 8), step.Sample(210.0, 200.0, 100.0, 20.0, 9)]
    second = [step.Sample(220.0, 206.0, 103.0, 22.0, 8), step.Sample(231.0, 206.0, 103.0, 22.0, 8)]
    options = argparse.Namespace(
        micro_batch_size=2, num_microbatches=8, seq_length=32, size="tiny", peak_tflops=989.0
    )
    pre, peri = step.summarize({"pre": first, "peri": second}, options)
    assert pre["wait_share"] == pytest.approx((80 / 180 + 0.5) / 2)
    assert peri["wait_share"] == pytest.approx(0.5)
    assert peri["wall_over_first"] == pytest.approx([1.1, 1.1, 1.1])
    assert peri["norm_over_first"] == pytest.approx([0.02, 0.02, 0.02])
    assert pre["tokens_per_second"] == pytest.approx(512 / 0.205)
    assert pre["busy_mfu"] / pre["mfu"] == pytest.approx(2.05)
    assert pre["peak_gb"] == pytest.approx(9e-9)
