"""What is wrong in megatron-core 0.19 with the state of its optimizers: what is saved, and loaded.

``DistributedOptimizer`` is in megatron/core/optimizer/distrib_optimizer.py, ``ChainedOptimizer`` in
optimizer.py beside it.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    param_group_identifier_keys,
)
from megatron.training import get_args

from megatron_periln.errors import UsageError
from megatron_periln.patches.registry import changes

__all__ = [
    "follow_another_schedule",
    "keep_adam_steps_apart",
    "materialize_adam_state",
    "reshard_over_expert_parallelism",
    "save_buckets_that_are_padding_here",
    "save_every_bucket_of_adam_state",
]

_Group = dict[str, Any]
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_SCHEDULED = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "start_wd": "--start-weight-decay",
    "end_wd": "--end-weight-decay",
}
"""What a group of parameters holds of its schedule, with the flag that it is, or is a multiple of."""


@changes(
    f"{_DISTRIBUTED}.state_dict",
    why="without Transformer Engine and Apex it expects a `step` in every parameter's state, which "
    "torch's Adam creates in its first step only: loading a checkpoint fails",
    until="patches/test_optimizer_state.py::test_upstream_still_cannot_describe_adam_before_its_first_step",
)
def materialize_adam_state() -> None:
    """Let the distributed optimizer describe Adam's state before the first step."""
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    state_dict = DistributedOptimizer.state_dict

    def with_state(self: Any) -> Any:
        inner = self.optimizer
        if isinstance(inner, torch.optim.Adam | torch.optim.AdamW) and not inner.state:
            for group in inner.param_groups:
                for parameter in group["params"]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return state_dict(self)

    DistributedOptimizer.state_dict = with_state


@changes(
    f"{_DISTRIBUTED}.load_state_dict",
    f"{_DISTRIBUTED}._set_main_param_and_optimizer_states",
    why="all parameters get the same `step` tensor, which torch's Adam then increments once per "
    "parameter: a resumed run diverges silently. The loaders of resharded state want `step` from "
    "checkpoints that keep it elsewhere, and copy into fp32 weights while autograd watches: errors",
    until=(
        "patches/test_optimizer_state.py::test_upstream_still_counts_one_step_for_all_parameters_after_loading",
        "patches/test_optimizer_state.py::test_upstream_still_wants_the_step_from_resharded_state",
        "patches/test_optimizer_state.py::test_upstream_still_cannot_load_state_saved_by_bucket_in_fp32",
    ),
)
def keep_adam_steps_apart() -> None:
    """Restore one ``step`` per parameter."""
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    load_state_dict = DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_own_steps(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    def without_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        with torch.no_grad():
            set_states(self, model_param, {**tensors, "step": None})

    DistributedOptimizer.load_state_dict = with_own_steps
    DistributedOptimizer._set_main_param_and_optimizer_states = without_step


@changes(
    f"{_DISTRIBUTED}.sharded_param_state_fully_reshardable",
    why="it joins the buckets without the padding at their ends, but finds a parameter in them at its "
    "offset in the padded buffer: behind a padded bucket it saves a neighbour's values, and zeros "
    "at the end. Upstream fixed it after 0.19 (Megatron-LM #5077)",
    until="patches/test_optimizer_state.py::test_upstream_still_saves_a_shared_embedding_from_the_wrong_place",
)
def save_every_bucket_of_adam_state() -> None:
    """Save Adam's state of parameters that don't share the first bucket.

    An embedding that two pipeline stages share has a bucket of its own, and overlapping communication makes
    many.
    """
    sharded_state = DistributedOptimizer.sharded_param_state_fully_reshardable
    if "cumulative_padding_stripped" in sharded_state.__code__.co_varnames:
        return  # Upstream's own fix is there: the padding would be subtracted twice, and all be saved wrong.

    def without_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = _without_padding(buffer)
            return sharded_state(self, *args, **kwargs)
        finally:
            for buffer, index_map in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = index_map

    DistributedOptimizer.sharded_param_state_fully_reshardable = without_padding


@changes(
    f"{_DISTRIBUTED}.get_parameter_state_dp_reshardable",
    why="the first save ends a run (`empty bucket encountered`) in which a data-parallel rank has nothing of "
    "a bucket but its padding, as small buckets have with `--ddp-pad-buckets-for-high-nccl-busbw`",
    until="patches/test_optimizer_state.py::test_upstream_still_saves_no_bucket_that_is_padding_on_a_rank",
)
def save_buckets_that_are_padding_here() -> None:
    """Let a rank save nothing of a bucket in which it has no parameter."""
    parameter_state = DistributedOptimizer.get_parameter_state_dp_reshardable

    def never_empty(self: Any) -> Any:
        state = parameter_state(self)
        for index, _ in enumerate(self.gbuf_ranges):
            for buckets in state[index].values():
                for bucket in buckets:
                    if not bucket:  # what upstream passes over when it loads, and where it is padding itself
                        bucket.append({"gbuf_local_start": 0, "gbuf_local_end": 0, "padding": True})
        return state

    DistributedOptimizer.get_parameter_state_dp_reshardable = never_empty


def _without_padding(buffer: Any) -> dict[torch.nn.Parameter, tuple[int, int, int]]:
    """Return the start and end of each parameter in the buckets of ``buffer`` without their padding."""
    paddings = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
    before = [0, *accumulate(paddings)]
    return {
        parameter: (start - before[bucket], end - before[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


@changes(
    "megatron.core.optimizer.optimizer.ChainedOptimizer.load_state_dict",
    why="expert parallelism gives the experts an optimizer of their own. Every tensor reshards, but "
    "what is saved beside the tensors, such as the step, is kept per optimizer, and another number "
    "of them is refused",
    until="patches/test_optimizer_state.py::test_upstream_still_cannot_load_another_number_of_optimizers",
)
def reshard_over_expert_parallelism() -> None:
    """Load an optimizer's state that was saved with, or without, expert parallelism into the other."""
    load_state_dict = ChainedOptimizer.load_state_dict

    def with_any_number(self: Any, state_dict: dict[Any, Any]) -> None:
        load_state_dict(self, _regrouped(state_dict, self.chained_optimizers))

    ChainedOptimizer.load_state_dict = with_any_number


def _regrouped(state_dict: dict[Any, Any], optimizers: list[Any]) -> dict[Any, Any]:
    """Return ``state_dict`` with what was saved once, or per optimizer, as ``optimizers`` need it."""
    saved = {key: value for key, value in state_dict.items() if not isinstance(key, int)}
    parts = {key: value for key, value in state_dict.items() if isinstance(key, int)}
    if not saved or not parts:
        return state_dict
    if len(optimizers) == 1:
        groups = [group for part in parts.values() for group in part["optimizer"]["param_groups"]]
        own = {**saved.get("optimizer", {}), "param_groups": _unique(groups, experts=False)}
        return {**parts[0], **saved, "optimizer": own}
    groups = saved["optimizer"]["param_groups"]
    for index, part in parts.items():
        experts = any(group["is_expert_parallel"] for group in optimizers[index].param_groups)
        own = {**saved.get("optimizer", {}), **part.get("optimizer", {})}
        own["param_groups"] = _unique(groups, experts=experts)
        parts[index] = {**saved, **part, "optimizer": own}
    return parts


def _unique(groups: list[dict[str, Any]], *, experts: bool) -> list[dict[str, Any]]:
    """Return the parameter groups as those of experts, or of all else; each kind once."""
    names = [name for name in param_group_identifier_keys if name != "is_expert_parallel"]
    kinds = {tuple(str(group.get(name)) for name in names): group for group in groups}
    return [{**group, "is_expert_parallel": experts} for group in kinds.values()]


@changes(
    "megatron.core.optimizer.optimizer.FP32Optimizer.load_state_dict",
    "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params.load_state_dict",
    f"{_DISTRIBUTED}.load_state_dict",
    why="it knows a checkpoint's groups of parameters by their learning rates, among others: with another "
    "`--lr` or `--min-lr` it finds none, even where `--override-opt-param-scheduler` or "
    "`--use-checkpoint-opt-param-scheduler` says which one counts",
    until="patches/test_optimizer_state.py::test_upstream_still_finds_no_group_of_another_learning_rate",
)
def follow_another_schedule() -> None:
    """Load an optimizer's state into one with another learning rate; the flags say which of them counts."""
    for optimizer in (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer):
        optimizer.load_state_dict = _loading_either(optimizer.load_state_dict)


def _loading_either(load_state_dict: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(load_state_dict)
    def load(self: Any, state_dict: Any) -> None:
        keys = [key for key in ("optimizer", "optimizer_state_dict") if key in state_dict]
        inner = state_dict[keys[0]] if keys else state_dict
        pairs = _same_but_scheduled(self.optimizer.param_groups, inner["param_groups"])
        ours, theirs = ([_schedule(pair[which]) for pair in pairs] for which in (0, 1))
        if ours == theirs:
            load_state_dict(self, state_dict)
            return
        args = get_args()
        if not (args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
            differences = {
                f"{_SCHEDULED[name]} gave {there}, and here gives {here[name]}"
                for here, before in zip(ours, theirs, strict=True)
                for name, there in before.items()
                if here.get(name) != there
            }
            raise UsageError(
                f"the checkpoint was trained with another schedule ({'; '.join(sorted(differences))}); "
                "give --override-opt-param-scheduler to follow the flags, "
                "or --use-checkpoint-opt-param-scheduler to follow the checkpoint"
            )
        inner["param_groups"] = [{**saved, **here} for (_, saved), here in zip(pairs, ours, strict=True)]
        load_state_dict(self, state_dict)
        if not args.override_opt_param_scheduler:
            for group, before in zip(self.optimizer.param_groups, theirs, strict=True):
                group.update(before)

    return load


def _same_but_scheduled(own: list[_Group], saved: list[_Group]) -> list[tuple[_Group, _Group]]:
    """Return each group of an optimizer with the checkpoint's that differs in its schedule at most.

    Several that differ in nothing else, as with ``--use-mup``, have multiples of one rate, which keep their
    order. Empty if they do not fit each other, which upstream then tells.
    """
    kinds, saved_kinds = _by_kind(own), _by_kind(saved)
    if {kind: len(rates) for kind, rates in kinds.items()} != {
        kind: len(saved_kinds[kind]) for kind in kinds if kind in saved_kinds
    }:
        return []
    pairs = []
    for group in own:
        kind = _kind(group)
        position = sorted(kinds[kind]).index(_rates(group))
        pairs.append((group, saved_kinds[kind][sorted(saved_kinds[kind])[position]]))
    return pairs


def _by_kind(groups: list[_Group]) -> dict[tuple[str, ...], dict[tuple[float, ...], _Group]]:
    kinds: dict[tuple[str, ...], dict[tuple[float, ...], _Group]] = defaultdict(dict)
    for group in groups:
        kinds[_kind(group)][_rates(group)] = group
    return kinds


def _kind(group: _Group) -> tuple[str, ...]:
    """Return what tells groups apart but their schedule; `pre_` is what NeMo writes."""
    names = (name for name in param_group_identifier_keys if name not in _SCHEDULED)
    return tuple(str(group.get(name, group.get(f"pre_{name}"))) for name in names)


def _rates(group: _Group) -> tuple[float, ...]:
    return tuple(-1.0 if group.get(name) is None else float(group[name]) for name in _SCHEDULED)


def _schedule(group: _Group) -> _Group:
    return {name: group[name] for name in _SCHEDULED if group.get(name) is not None}
