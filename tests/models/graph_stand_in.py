"""What a CUDA graph does, on the CPU: it repeats the operations that Python called, without Python.

Each operation writes its results where it wrote them when it was captured. As under capture, what would have
the host wait for a value is refused.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Their results, or the shapes of them, are values that the host has to know.
_WAITING = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero),
    *(aten._unique2, aten.unique_consecutive, aten.unique_dim, aten.repeat_interleave),
}


class HostWaitsError(RuntimeError):
    """An operation that capture does not permit."""


class Graph(TorchDispatchMode):
    """Captures the operations called within it; ``replay`` repeats them."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in _WAITING:
            raise HostWaitsError(f"{function} is not permitted when a graph is captured")
        results = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def replay(self):
        """Repeat all operations, on what their arguments hold now."""
        for function, args, kwargs, results in self.operations:
            read = {_storage(value) for value in tree_leaves((args, kwargs)) if torch.is_tensor(value)}
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                # What shares memory with an argument, a view or the argument itself, is up to date.
                if torch.is_tensor(old) and old.numel() and _storage(old) not in read:
                    old.detach().copy_(new)


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()
