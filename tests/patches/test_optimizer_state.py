"""Each fix of the optimizers' state: the failure without it, and none with it.

A test named ``upstream_still_...`` fails once upstream has fixed it.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer, param_group_identifier_keys

from megatron_periln.patches import optimizer_state
from tests.cpu import fresh
from tests.patches.applied import with_fixes, without_fixes
from tests.training.small_optimizers import build_optimizer, build_optimizers, steps, train, weights

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


def test_upstream_still_cannot_describe_adam_before_its_first_step(torch_adam):
    with pytest.raises(fresh.CallError, match="AssertionError"):
        without_fixes(state_before_the_first_step)


def test_adam_is_described_before_its_first_step(torch_adam):
    step, trained, counted = with_fixes(["materialize_adam_state"], state_before_the_first_step)
    assert step == 0
    assert counted == [2, 2, 2, 2]
    assert trained == without_fixes(weights_after_two_steps)


def test_upstream_still_counts_one_step_for_all_parameters_after_loading(torch_adam):
    tensors, counted = without_fixes(resumed_steps, 1)
    assert tensors == 1
    assert counted == [3 + 4] * 4


@pytest.mark.parametrize("names", [["keep_adam_steps_apart"], ADAM])
def test_each_parameter_counts_its_own_steps_after_loading(torch_adam, names):
    tensors, counted = with_fixes(names, resumed_steps, 2)
    assert tensors == 4
    assert counted == [5, 5, 5, 5]


def test_upstream_still_wants_the_step_from_resharded_state(torch_adam):
    with pytest.raises(fresh.CallError, match="KeyError: 'step'"):
        without_fixes(load_resharded_state)


def test_resharded_state_loads_without_the_step(torch_adam):
    loaded = with_fixes(["keep_adam_steps_apart"], load_resharded_state)
    assert loaded == {"param": [1], "exp_avg": [1], "exp_avg_sq": [1], "step": [3]}


def test_upstream_still_cannot_load_state_saved_by_bucket_in_fp32(torch_adam):
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


def test_upstream_still_saves_a_shared_embedding_from_the_wrong_place(torch_adam):
    assert with_fixes(["materialize_adam_state"], largest_difference_of_the_saved_weights) > 0.1


def test_every_bucket_is_saved_as_it_is(torch_adam):
    names = ["materialize_adam_state", "save_every_bucket_of_adam_state"]
    assert with_fixes(names, largest_difference_of_the_saved_weights) == 0


def is_left_alone_where_upstream_fixed_it():
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    def sharded_state(self):
        cumulative_padding_stripped = [0]
        return cumulative_padding_stripped

    DistributedOptimizer.sharded_param_state_fully_reshardable = sharded_state
    optimizer_state.save_every_bucket_of_adam_state()
    return DistributedOptimizer.sharded_param_state_fully_reshardable is sharded_state


def test_padding_is_not_subtracted_twice():
    """Upstream's next version subtracts it; both together would save every bucket from the wrong place."""
    assert without_fixes(is_left_alone_where_upstream_fixed_it)


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
    "experts, failure", [(True, "RuntimeError: Expected 2 entries"), (False, "KeyError: 'param_groups'")]
)
def test_upstream_still_cannot_load_another_number_of_optimizers(torch_adam, experts, failure):
    with pytest.raises(fresh.CallError, match=failure):
        without_fixes(steps_resumed_with, experts)


@pytest.mark.parametrize("experts, counted", [(True, [[4, 4], [4, 4]]), (False, [[4, 4, 4, 4]])])
def test_another_number_of_optimizers_loads(torch_adam, experts, counted):
    names = [*ADAM, "reshard_over_expert_parallelism"]
    assert with_fixes(names, steps_resumed_with, experts) == counted


def another_learning_rate():
    saved = {"max_lr": 1e-3, "min_lr": 0.0, "wd_mult": 1.0, "lr_mult": 1.0, "params": [0]}
    MegatronOptimizer._filter_and_reorder_param_groups([{**saved, "max_lr": 1e-2}], [saved])


def test_upstream_still_finds_no_group_of_another_learning_rate():
    with pytest.raises(fresh.CallError, match="ValueError: Could not find parameter group"):
        without_fixes(another_learning_rate)
    assert "max_lr" in param_group_identifier_keys
    source = inspect.getsource(distrib_optimizer)
    assert "param_groups_map[needed_groups]" in source


# Buckets of which a rank has padding alone.


class SecondOfTwo:
    """The second of two data-parallel ranks: of a bucket of 3 elements, padded to 8, it has the padding."""

    per_bucket_numel = per_bucket_numel_unpadded = ()
    distributed_optimizer_instance_id = data_parallel_group_idx = 0
    gbuf_ranges = ({torch.float32: ({"param_map": {}},)},)
    buffers = (SimpleNamespace(buckets=[SimpleNamespace(numel_unpadded=3, grad_data=torch.zeros(8))]),)
    data_parallel_group = SimpleNamespace(rank=lambda: 1, size=lambda: 2)

    def get_parameter_state_dp_reshardable(self):
        return distrib_optimizer.DistributedOptimizer.get_parameter_state_dp_reshardable(self)


def save_bucket_of_padding():
    optimizer = distrib_optimizer.DistributedOptimizer
    state = optimizer.sharded_param_state_dp_reshardable(SecondOfTwo(), {})
    ((bucket,),) = state[0].values()
    return bucket


def test_a_rank_saves_nothing_of_a_bucket_in_which_it_has_no_parameter():
    (nothing,) = with_fixes(["save_buckets_that_are_padding_here"], save_bucket_of_padding)
    assert [type(value).__name__ for value in nothing.values()] == ["LocalNonpersistentObject"]
    assert nothing["padding"].unwrap() is True


def test_upstream_still_saves_no_bucket_that_is_padding_on_a_rank():
    with pytest.raises(fresh.CallError, match="empty bucket"):
        without_fixes(save_bucket_of_padding)
