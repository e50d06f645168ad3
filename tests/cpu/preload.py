"""What processes of `tests.cpu.fresh` start with."""

import atexit
import gc

from megatron_periln import cpu

cpu.activate()

import megatron.core.optimizer  # noqa: E402
import megatron.training.initialize  # noqa: E402, F401
import pytest  # noqa: E402, F401  # as their functions' modules do
import torch._dynamo  # noqa: E402, F401  # as an optimizer does, where nothing is changed: 0.8 s

# They then neither look for garbage among what is imported, nor copy its pages.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # or nanobind lists leaks
