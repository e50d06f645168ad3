"""How tests are spread over processes under pytest-xdist.

A folder's tests run in one process: they share what is slow to make. Its own groups of tests would do, but
pytest 9.2 takes no notice of them (pytest-xdist #1386). The longest start first.
"""

import os

import psutil
import pytest

# By their seconds; the others follow by the number of their tests.
LONGEST = (
    "tests/parallel",
    "tests/training",
    "tests/norms",
    "tests/convert",
    "tests/recipes",
    "tests/test_wheel.py",
    "tests/faults",
    "tests/convert/tokens",
    "tests/data/preprocess",
    "tests/patches",
    "tests/doctor",
    "tests/studies",
    "tests/test_types.py",
    "tests/examples",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Half as many again as there are cores: ranks wait for each other, and tests for what hangs."""
    if os.environ.get("MEGATRON_PERILN_TEST_DEVICE") == "cuda":
        return None  # as many as there are cores, for they share a GPU's memory
    return (3 * len(psutil.Process().cpu_affinity()) + 1) // 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScheduling, LoadScopeScheduling

    if os.environ.get("MEGATRON_PERILN_TEST_IN_ORDER") == "1":  # gpu-check: the most telling first
        return LoadScheduling(config, log)

    class Folders(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.partition("::")[0]
            folder = path.rpartition("/")[0]
            return path if folder == "tests" else folder  # files outside folders share nothing

        def _assign_work_unit(self, node):
            for first in LONGEST[::-1]:
                if first in self.workqueue:
                    self.workqueue.move_to_end(first, last=False)
            super()._assign_work_unit(node)

    return Folders(config, log)
