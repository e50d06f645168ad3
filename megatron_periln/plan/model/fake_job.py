"""One rank of a job that isn't running: Megatron's parallel state over process groups that send nothing."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.tensor_parallel import random
from megatron.core.utils import GlobalMemoryBuffer
from megatron.training import global_vars
from torch.distributed import distributed_c10d as c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_periln.training.run import embedding_ranks

__all__ = ["fake_rank"]

_MODULES = (parallel_state, num_microbatches_calculator, global_vars, random)
# Far from the names, which are numbers, of the groups of a job that this process may be a rank of.
_FIRST_GROUP = 1 << 40


_KEPT = ("pg_map", "pg_names", "pg_group_ranks", "pg_backend_config", "tags_to_pg", "pg_to_tag")


def _world() -> Any:
    """Return a record of groups apart from that of a job that this process may be a rank of.

    Torch's has properties that read its module's globals.
    """
    world = type("_World", (c10d._World,), dict.fromkeys((*_KEPT, "group_count")))()
    vars(world).update({name: {} for name in _KEPT}, group_count=_FIRST_GROUP)
    return world


def _globals(module: ModuleType) -> dict[str, Any]:
    """Return what a module keeps of a job: not its functions, classes and modules."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("__") and not callable(value) and not isinstance(value, ModuleType)
    }


@contextmanager
def _apart() -> Iterator[None]:
    """Put away what this process knows of a job that it is a rank of, and put it back in the end."""
    kept = {module: _globals(module) for module in _MODULES}
    tracker = random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED
    state = torch.get_rng_state()
    try:
        for name, value in kept[parallel_state].items():
            if name.startswith("_") and name.isupper() and not isinstance(value, dict | frozenset):
                setattr(parallel_state, name, None)
        parallel_state._GLOBAL_MEMORY_BUFFER = None
        random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED = None, False
        with mock.patch.object(c10d, "_world", _world()):
            yield
    finally:
        for module, names in kept.items():
            for name in set(_globals(module)) - names.keys():
                delattr(module, name)
            vars(module).update(names)
        random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED = tracker
        torch.set_rng_state(state)


def _new_group(create: Any, rank: int) -> Any:
    """Return ``new_group`` for a rank that makes none but its own: of 16,384 ranks there are thousands."""

    def new_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        if ranks is not None and rank not in ranks:
            return c10d.GroupMember.NON_GROUP_MEMBER
        return create(ranks, *args, **kwargs)

    return new_group


def _gather_objects(gathered: list[Any], thing: Any, *_: Any, **__: Any) -> None:
    """Stand for ``all_gather_object``: every rank says the same."""
    gathered[:] = [thing] * len(gathered)


@contextmanager
def fake_rank(args: Namespace, rank: int) -> Iterator[None]:
    """Be a rank of the job that validated ``args`` describe; what is sent arrives at once, as anything."""
    with _apart():
        global_vars._GLOBAL_ARGS = args
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=args.world_size)
        try:
            with mock.patch("torch.distributed.new_group", _new_group(torch.distributed.new_group, rank)):
                parallel_state.initialize_model_parallel(
                    args.tensor_model_parallel_size,
                    args.pipeline_model_parallel_size,
                    args.virtual_pipeline_model_parallel_size,
                    context_parallel_size=args.context_parallel_size,
                    expert_model_parallel_size=args.expert_model_parallel_size,
                    num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
                    expert_tensor_parallel_size=args.expert_tensor_parallel_size,
                    order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
                    get_embedding_ranks=embedding_ranks,
                    create_gloo_process_groups=False,
                )
            parallel_state._GLOBAL_MEMORY_BUFFER = GlobalMemoryBuffer()
            random.model_parallel_cuda_manual_seed(args.seed)
            with mock.patch("torch.distributed.all_gather_object", _gather_objects):
                yield
        finally:
            torch.distributed.destroy_process_group()
