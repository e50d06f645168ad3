"""The device that tests run on, and Megatron in one process.

Tests run on the CPU, with a GPU hidden if there is one and Triton's kernels interpreted. Those in
tests/gpu need ``MEGATRON_PERILN_TEST_DEVICE=cuda``, which ``make test-gpu`` sets.
"""

import atexit
import gc
import logging
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
DEVICE = os.environ.get("MEGATRON_PERILN_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from hypothesis import settings

from tests import help_texts
from tests.folders import (  # noqa: F401
    pytest_xdist_auto_num_workers,
    pytest_xdist_make_scheduler,
)

# No test depends on the machine's speed, or on chance.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.load_profile("fixed")

if DEVICE == "cpu":
    from megatron_periln import cpu

    cpu.activate()

torch.set_num_threads(1)


def pytest_collection_finish():
    """Leave thousands of tests and all that they import out of each search for garbage; read help once."""
    if "megatron.training.argument_utils" in sys.modules:
        help_texts.read_once()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)  # a twelfth of these processes' time was looking for garbage
    atexit.register(gc.unfreeze)  # or nanobind lists leaks


@pytest.fixture(autouse=True)
def megatron_s_warnings():
    """Undo what a tool does that silences Megatron."""
    logger = logging.getLogger("megatron")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def single_process():
    """Megatron's parallel state in a world of one process."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_periln.patches import fixes

    fixes.apply()
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
