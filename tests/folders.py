"""A folder's tests run in one process under pytest-xdist: they share what is slow to make.

Its own groups of tests would do, but pytest 9.2 takes no notice of them (pytest-xdist #1386). The longest
start first.
"""

import os

import pytest

# By their seconds; the others follow by the number of their tests.
LONGEST = (
    "tests/parallel",
    "tests/training",
    "tests/norms",
    "tests/convert",
    "tests/recipes",
    "tests/faults",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScheduling, LoadScopeScheduling

    if os.environ.get("MEGATRON_PERILN_TEST_IN_ORDER") == "1":  # gpu-check: the most telling first
        return LoadScheduling(config, log)

    class Folders(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid.partition("::")[0].rpartition("/")[0]

        def _assign_work_unit(self, node):
            for folder in LONGEST[::-1]:
                if folder in self.workqueue:
                    self.workqueue.move_to_end(folder, last=False)
            super()._assign_work_unit(node)

    return Folders(config, log)
