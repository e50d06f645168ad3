"""Each fix of megatron-core: the fault without it, and none with it.

A test whose name says what upstream does fails once upstream has mended it. Every check runs in a
process of its own, where nothing but what it applies has been fixed.
"""

import pytest
import torch

from megatron_periln import fixes
from tests.cpu import fresh
from tests.training.optimizers import build_optimizer, build_optimizers, steps, train, weights


def without_fixes(check, *arguments):
    return fresh.call(check, *arguments)


def with_fixes(names, check, *arguments):
    return fresh.call(_fix_and_check, names, check, arguments)


def _fix_and_check(names, check, arguments):
    for name in names:
        getattr(fixes, name)()
    return check(*arguments)


def test_all_fixes_are_applied_once():
    called, public = fresh.call(what_apply_calls)
    assert sorted(called) == sorted(public)
    assert len(public) >= 5


def what_apply_calls():
    """Return the names of the fixes that two calls of ``apply`` apply, and of those there are."""
    called, public = [], []
    for name, value in list(vars(fixes).items()):
        ours = getattr(value, "__module__", None) == fixes.__name__
        if ours and not name.startswith("_") and name != "apply":
            public.append(name)
            setattr(fixes, name, lambda name=name: called.append(name))
    fixes.apply()
    fixes.apply()
    return called, public


# The dataset helpers.


def compile_dataset_helpers():
    from megatron.core.datasets import helpers, utils

    utils.compile_helpers()
    return callable(helpers.build_sample_idx)


def test_upstream_cannot_compile_the_dataset_helpers_of_its_wheel():
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
def test_upstream_takes_false_for_fp8(fp8):
    assert without_fixes(takes_the_fp8_path, fp8)


def test_upstream_cannot_recompute_norms_without_transformer_engine():
    with pytest.raises(fresh.CallError, match="FP8GlobalStateManager"):
        without_fixes(recompute_without_fp8)


@pytest.mark.parametrize(
    "fp8, takes_it", [({}, False), ({"fp8": False}, False), ({"fp8": None}, False), ({"fp8": "hybrid"}, True)]
)
def test_only_fp8_takes_the_fp8_path(fp8, takes_it):
    assert with_fixes(["checkpoint_without_output_off_fp8"], takes_the_fp8_path, fp8) is takes_it


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


def test_upstream_needs_apex_to_accumulate_weight_gradients():
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
    fixes._add_product(inputs, gradients, total)
    with pytest.raises(RuntimeError):
        fixes._add_product(inputs, gradients[:9], total)


# Adam's state in the distributed optimizer.

ADAM = ["materialize_adam_state", "keep_adam_steps_apart"]


def state_before_the_first_step():
    model, optimizer = build_optimizer()
    (group, *_) = optimizer.state_dict()["optimizer"]["param_groups"]
    train(model, optimizer, iterations=2)
    return group["step"], weights(model), [step.item() for step in steps(optimizer)]


def weights_after_two_steps():
    model, optimizer = build_optimizer()
    train(model, optimizer, iterations=2)
    return weights(model)


def resumed_steps(iterations):
    """Return how many tensors hold the steps of a loaded state, and their values ``iterations`` later."""
    model, optimizer = build_optimizer()
    train(model, optimizer, iterations=3)
    saved = optimizer.state_dict()
    model, optimizer = build_optimizer()
    optimizer.load_state_dict(saved)
    tensors = {step.data_ptr() for step in steps(optimizer)}
    train(model, optimizer, iterations)
    return len(tensors), [step.item() for step in steps(optimizer)]


def load_resharded_state():
    """Load a parameter's state as the loaders of resharded checkpoints do: without ``step``."""
    model, optimizer = build_optimizer()
    train(model, optimizer, iterations=3)
    parameter = next(iter(optimizer.model_param_group_index_map))
    tensors = optimizer._get_main_param_and_optimizer_states(parameter)
    ones = {name: torch.ones_like(value) for name, value in tensors.items() if name != "step"}
    with torch.no_grad():
        optimizer._set_main_param_and_optimizer_states(parameter, ones)
    after = optimizer._get_main_param_and_optimizer_states(parameter)
    return {name: value.unique().tolist() for name, value in after.items()}


def resume_from_buckets(step):
    """Load state that was saved by bucket, Megatron's default; return the steps after that.

    Each parameter's state has ``step`` as it is before loading, for checkpoints keep it elsewhere.
    """
    model, optimizer = build_optimizer()
    train(model, optimizer, iterations=3)
    buckets = optimizer.get_parameter_state_dp_reshardable()
    for bucket in buckets[0][torch.float32, torch.float32]:
        for state in bucket:
            state |= {"padding": False, "step": torch.tensor(step)}
    optimizer.load_state_dict(
        {**optimizer.state_dict(), "param_state": buckets, "param_state_sharding_type": "dp_reshardable"}
    )
    return [step.item() for step in steps(optimizer)]


@pytest.fixture(scope="module")
def torch_adam():
    """Skips where Transformer Engine or Apex provides Adam, which keeps ``step`` otherwise."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        pytest.skip("Adam is Transformer Engine's or Apex's here")


def test_upstream_cannot_describe_adam_before_its_first_step(torch_adam):
    with pytest.raises(fresh.CallError, match="AssertionError"):
        without_fixes(state_before_the_first_step)


def test_adam_is_described_before_its_first_step(torch_adam):
    step, trained, counted = with_fixes(["materialize_adam_state"], state_before_the_first_step)
    assert step == 0
    assert counted == [2, 2, 2, 2]
    assert trained == without_fixes(weights_after_two_steps)


def test_upstream_counts_one_step_for_all_parameters_after_loading(torch_adam):
    tensors, counted = without_fixes(resumed_steps, 1)
    assert tensors == 1
    assert counted == [3 + 4] * 4


@pytest.mark.parametrize("names", [["keep_adam_steps_apart"], ADAM])
def test_each_parameter_counts_its_own_steps_after_loading(torch_adam, names):
    tensors, counted = with_fixes(names, resumed_steps, 2)
    assert tensors == 4
    assert counted == [5, 5, 5, 5]


def test_upstream_wants_the_step_from_resharded_state(torch_adam):
    with pytest.raises(fresh.CallError, match="KeyError: 'step'"):
        without_fixes(load_resharded_state)


def test_resharded_state_loads_without_the_step(torch_adam):
    loaded = with_fixes(["keep_adam_steps_apart"], load_resharded_state)
    assert loaded == {"param": [1], "exp_avg": [1], "exp_avg_sq": [1], "step": [3]}


def test_upstream_cannot_load_state_saved_by_bucket_in_fp32(torch_adam):
    with pytest.raises(fresh.CallError, match="view of a leaf Variable"):
        without_fixes(resume_from_buckets, 3.0)


def test_state_saved_by_bucket_loads_and_keeps_the_steps(torch_adam):
    assert with_fixes(["keep_adam_steps_apart"], resume_from_buckets, 0.0) == [3, 3, 3, 3]


# Adam's state in several buckets.


def largest_difference_of_the_saved_weights():
    """Return how far the weights in fully reshardable state are from the model's."""
    from megatron.core.dist_checkpointing import ShardedTensor

    model, optimizer = build_optimizer(shared_embedding=True)
    train(model, optimizer)
    assert len(optimizer.buffers[0].buckets) == 2
    described = {
        name: ShardedTensor.from_rank_offsets(name, parameter)
        for name, parameter in model.module.named_parameters()
    }
    saved = optimizer.sharded_param_state_fully_reshardable(described, metadata={})
    weights = {state["param"].key: state["param"].data for state in saved.values()}
    return max(
        (weights[f"optimizer.state.param.{name}"] - sharded.data).abs().max().item()
        for name, sharded in described.items()
    )


def test_upstream_saves_a_shared_embedding_from_the_wrong_place(torch_adam):
    assert with_fixes(["materialize_adam_state"], largest_difference_of_the_saved_weights) > 0.1


def test_every_bucket_is_saved_as_it_is(torch_adam):
    names = ["materialize_adam_state", "save_every_bucket_of_adam_state"]
    assert with_fixes(names, largest_difference_of_the_saved_weights) == 0


# Experts, which have an optimizer of their own under expert parallelism.


def steps_resumed_with(experts):
    """Return each optimizer's steps, resumed from a checkpoint saved the other way round.

    Megatron merges what is saved beside the tensors with the tensors, which lie as they are needed.
    """
    model, optimizers = build_optimizers(experts=not experts)
    train(model, optimizers, iterations=3)
    saved = optimizers.state_dict()
    merged = {**saved, 0: {}, 1: {}} if experts else {**dict(enumerate(saved)), "optimizer": {}}
    model, optimizers = build_optimizers(experts)
    optimizers.load_state_dict(merged)
    train(model, optimizers)
    return [[step.item() for step in steps(optimizer)] for optimizer in optimizers.chained_optimizers]


@pytest.mark.parametrize(
    "experts, fault", [(True, "RuntimeError: Expected 2 entries"), (False, "KeyError: 'param_groups'")]
)
def test_upstream_cannot_load_another_number_of_optimizers(torch_adam, experts, fault):
    with pytest.raises(fresh.CallError, match=fault):
        without_fixes(steps_resumed_with, experts)


@pytest.mark.parametrize("experts, counted", [(True, [[4, 4], [4, 4]]), (False, [[4, 4, 4, 4]])])
def test_another_number_of_optimizers_loads(torch_adam, experts, counted):
    names = [*ADAM, "reshard_over_expert_parallelism"]
    assert with_fixes(names, steps_resumed_with, experts) == counted
