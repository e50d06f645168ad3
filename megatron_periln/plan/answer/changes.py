"""What may make a run fit, as data: each a few flags that are put in place of the run's."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_periln.flag_files import without

__all__ = ["CHANGES", "Change", "applied"]

Flags = list[str]


@dataclass(frozen=True)
class Change:
    """A change of a run.

    Attributes
    ----------
    flags
        Returns the flags that make it, for validated arguments; None where it makes no sense.
    drops
        Flags of the run that can't stand beside them.
    """

    flags: Callable[[Namespace], Flags | None]
    drops: tuple[str, ...] = ()


_RECOMPUTATION = (
    "--recompute-granularity",
    "--recompute-modules",
    "--recompute-method",
    "--recompute-num-layers",
    "--recompute-activations",
)


def _distributed_optimizer(args: Namespace) -> Flags | None:
    spread = args.data_parallel_size * args.context_parallel_size > 1
    return ["--use-distributed-optimizer"] if spread and not args.use_distributed_optimizer else None


def _sequence_parallel(args: Namespace) -> Flags | None:
    splits = args.tensor_model_parallel_size > 1 and not args.sequence_parallel
    return ["--sequence-parallel"] if splits else None


def _fused_loss(args: Namespace) -> Flags | None:
    return None if args.cross_entropy_loss_fusion else ["--cross-entropy-loss-fusion"]


def _recompute(*modules: str) -> Callable[[Namespace], Flags | None]:
    def flags(args: Namespace) -> Flags | None:
        present = set(args.recompute_modules or []) if args.recompute_granularity == "selective" else set()
        if args.recompute_granularity == "full" or present >= set(modules):
            return None
        if "moe_act" in modules and not args.num_experts:
            return None
        if "mlp" in modules and args.num_experts and args.moe_layer_freq == 1:
            return None
        return ["--recompute-granularity", "selective", "--recompute-modules", *sorted(present | {*modules})]

    return flags


def _recompute_all(args: Namespace) -> Flags | None:
    if args.recompute_granularity == "full":
        return None
    uniform = ["--recompute-method", "uniform", "--recompute-num-layers", "1"]
    return ["--recompute-granularity", "full", *uniform]


def _half_the_microbatch(args: Namespace) -> Flags | None:
    half, odd = divmod(args.micro_batch_size, 2)
    return None if odd else ["--micro-batch-size", str(half)]


def _twice(name: str, most: Callable[[Namespace], int], *more: str) -> Callable[[Namespace], Flags | None]:
    attribute = name.removeprefix("--").replace("-", "_")

    def flags(args: Namespace) -> Flags | None:
        twice = 2 * getattr(args, attribute)
        divides = args.data_parallel_size % 2 == 0 or name.startswith("--expert")
        return [name, str(twice), *more] if divides and twice <= most(args) else None

    return flags


def _of_a_node(args: Namespace) -> int:
    return min(8, int(args.num_attention_heads))


CHANGES = (
    Change(_distributed_optimizer),
    Change(_sequence_parallel),
    Change(_fused_loss),
    Change(_recompute("layernorm"), _RECOMPUTATION),
    Change(_recompute("layernorm", "moe_act"), _RECOMPUTATION),
    Change(_recompute("layernorm", "mlp"), _RECOMPUTATION),
    Change(_half_the_microbatch, ("--micro-batch-size",)),
    Change(_recompute_all, _RECOMPUTATION),
    Change(
        _twice("--expert-model-parallel-size", lambda args: int(args.num_experts or 0)),
        ("--expert-model-parallel-size",),
    ),
    Change(
        _twice("--tensor-model-parallel-size", _of_a_node, "--sequence-parallel"),
        ("--tensor-model-parallel-size", "--sequence-parallel"),
    ),
    Change(
        _twice("--pipeline-model-parallel-size", lambda args: int(args.num_layers or 0)),
        ("--pipeline-model-parallel-size",),
    ),
    Change(
        _twice("--context-parallel-size", lambda args: int(args.seq_length) // 2),
        ("--context-parallel-size",),
    ),
)
"""In the order in which they are told where they cost the same."""


def applied(flags: Sequence[str], args: Namespace) -> Iterator[tuple[Flags, Flags]]:
    """Yield what each change that makes sense puts in, and the whole of the flags then."""
    for change in CHANGES:
        put = change.flags(args)
        if put is not None:
            yield put, [*without(flags, change.drops), *put]
