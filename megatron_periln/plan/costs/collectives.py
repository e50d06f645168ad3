"""Counts what a rank sends: every collective of torch, whoever calls it, by group and kind.

Bytes are those of rings, as NCCL's bandwidth-bound algorithms send them: of a group of ``n`` ranks, an
all-gather sends ``n - 1`` times what a rank has, a reduce-scatter what it gets, an all-reduce twice
``(n - 1) / n`` of the tensor, an all-to-all what goes to the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CountCollectives", "Sent"]


class Sent(NamedTuple):
    """What a key of the count says.

    Attributes
    ----------
    group
        The group's description, which Megatron gives: such as ``TENSOR_MODEL_PARALLEL_GROUP``.
    ranks
        Its size.
    collective
        Such as ``"all-gather"``.
    """

    group: str
    ranks: int
    collective: str


def _size(tensors: object) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    if isinstance(tensors, Iterable):
        return sum(map(_size, tensors))
    return 0


def _all_to_all(arguments: list[Any], n: int) -> float:
    splits = arguments[4] if len(arguments) > 4 else []
    sent = _size(arguments[1])
    if not splits:
        return sent * (n - 1) / n
    own = splits[arguments[2].rank()]
    return sent * (1 - own / sum(splits)) if sum(splits) else 0.0


_ALL_GATHER: tuple[str, Callable[[list[Any], int], float]]
_ALL_GATHER = "all-gather", lambda arguments, n: (n - 1) * _size(arguments[1])
_REDUCE_SCATTER = "reduce-scatter", lambda arguments, n: (n - 1) * _size(arguments[0])
_ALL_REDUCE = "all-reduce", lambda arguments, n: 2 * (n - 1) / n * _size(arguments[0])
_BROADCAST = "broadcast", lambda arguments, n: (n - 1) / n * _size(arguments[0])

_BYTES: dict[str, tuple[str, Callable[[list[Any], int], float]]] = {
    "_allgather_base_": _ALL_GATHER,
    "allgather_": _ALL_GATHER,
    "allgather_coalesced_": _ALL_GATHER,
    "allgather_into_tensor_coalesced_": _ALL_GATHER,
    "_reduce_scatter_base_": _REDUCE_SCATTER,
    "reduce_scatter_": _REDUCE_SCATTER,
    "reduce_scatter_tensor_coalesced_": _REDUCE_SCATTER,
    "allreduce_": _ALL_REDUCE,
    "allreduce_coalesced_": _ALL_REDUCE,
    "alltoall_base_": ("all-to-all", _all_to_all),
    "alltoall_": ("all-to-all", lambda arguments, n: _size(arguments[1]) * (n - 1) / n),
    "send": ("send", lambda arguments, n: _size(arguments[0])),
    "broadcast_": _BROADCAST,
}
"""By the name of c10d's operator; its tensors come first, then its group."""


class CountCollectives(TorchDispatchMode):
    """While it is on, counts what this rank sends, in ``sent``: bytes by `Sent`.

    Also with a fake process group, and on fake tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[Sent] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operator, and run it."""
        if func.namespace == "c10d":
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: tuple[Any, ...]) -> None:
        found = _BYTES.get(func._schema.name.removeprefix("c10d::"))
        if found is None:
            return
        arguments = [
            ProcessGroup.unbox(each) if isinstance(each, torch.ScriptObject) and _is_group(each) else each
            for each in args
        ]
        group = next((each for each in arguments if isinstance(each, ProcessGroup)), None)
        if group is not None and group.size() > 1:
            name, bytes_of = found
            size = group.size()
            self.sent[Sent(group.group_desc, size, name)] += round(bytes_of(arguments, size))


def _is_group(script: torch.ScriptObject) -> bool:
    return script._type().qualified_name().endswith("ProcessGroup")
