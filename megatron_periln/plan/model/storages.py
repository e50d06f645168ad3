"""Which bytes are held when, while a model runs on fake tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Storages", "bytes_of", "on_call"]

_KNOWN = -1


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of tensors, each storage once."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


class Storages(TorchDispatchMode):
    """Logs each storage that is made while it is active, and when it is freed.

    Attributes
    ----------
    kind
        What the storages that are made from now on are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = ""
        self._events: list[tuple[int, int]] = []  # which storage, how many bytes it has from then on
        self._kinds: list[str] = []  # by storage
        self._numbers: dict[int, tuple[int, weakref.ref[Any]]] = {}  # storages there are, by id()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and log the storages of what it returns."""
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        if id(storage) in self._numbers:
            return
        number, key = len(self._kinds), id(storage)
        self._kinds.append(self.kind)
        self._events.append((number, storage.nbytes()))

        def freed(_: Any) -> None:
            del self._numbers[key]
            self._events.append((number, 0))

        self._numbers[key] = number, weakref.ref(storage, freed)

    def known(self, tensors: Iterable[Tensor]) -> None:
        """Take what these tensors hold for something that is not of this log."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            forget = partial(self._forget, id(storage))
            self._numbers[id(storage)] = _KNOWN, weakref.ref(storage, forget)

    def _forget(self, key: int, _: Any) -> None:
        self._numbers.pop(key, None)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Log from here to the end."""
        resize = torch.UntypedStorage.resize_
        storages = self

        def logged(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            found = storages._numbers.get(id(storage))
            if found and found[0] != _KNOWN:
                storages._events.append((found[0], size))
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", logged), self:
            yield

    @property
    def now(self) -> int:
        """How many events there have been."""
        return len(self._events)

    def held(self, moment: int) -> set[int]:
        """Return the storages that are held after so many events."""
        sizes = dict(self._events[:moment])
        return {number for number, size in sizes.items() if size}

    def by_kind(self, moment: int, *, but: Collection[int] = ()) -> Counter[str]:
        """Return the bytes that are held after so many events, by what they are.

        ``but`` are storages that don't count.
        """
        sums: Counter[str] = Counter()
        for number, size in dict(self._events[:moment]).items():
            if number not in but:
                sums[self._kinds[number]] += size
        return sums

    def peak(self, start: int, end: int, *, but: Collection[int] = ()) -> int:
        """Return the moment after ``start``, and until ``end``, at which most is held."""
        highest, total, moment = -1, 0, end
        sizes: dict[int, int] = {}
        for count, (number, size) in enumerate(self._events[:end], 1):
            if number in but:
                continue
            total += size - sizes.get(number, 0)
            sizes[number] = size
            if count > start and total > highest:
                highest, moment = total, count
        return moment


def on_call(modules: Iterable[torch.nn.Module], action: Callable[[], None]) -> list[Any]:
    """Have ``action`` run before each call of these modules; return the hooks' handles."""
    return [module.register_forward_pre_hook(lambda *_: action()) for module in modules]
