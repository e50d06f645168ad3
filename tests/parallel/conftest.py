import functools
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from tests.parallel.cases import WATCHED
from tests.parallel.jobs import Jobs
from tests.parallel.report import page

# Every run ends after LAST iterations; those that are compared start from one process's
# checkpoint of iteration FIRST - 1.
FIRST, LAST = 7, 10
MONITOR_CHANGES = "tests.parallel.monitor_changes"


@pytest.fixture(scope="session")
def indexed_bytes(tmp_path_factory):
    """The prefix of an indexed dataset: the bytes of Python's own sources, 256 marking an end."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("data") / "stdlib"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]:
        tokens = [*path.read_bytes(), 256]
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="session")
def jobs(tmp_path_factory, indexed_bytes):
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    running = Jobs(tmp_path_factory.mktemp("jobs"), indexed_bytes, shared)
    yield running
    running.close()


@pytest.fixture(scope="session")
def run(jobs):
    """Run a case once: one process from the start, other layouts from its checkpoint, some monitored.

    Compared are all iterations, or those until ``last``.
    """

    @functools.cache
    def cached(case, changes=(), last=LAST):
        interval = f"--save-wgrads-interval {FIRST} --eval-iters 0"
        if case == case.one_process and not changes:
            arguments = f"{case.model} {interval} --save-interval {FIRST - 1}"
        else:
            load = cached(case.one_process).folder / "checkpoints"
            arguments = f"{case.model} {case.execution} {interval} --load {load} --ckpt-step {FIRST - 1}"
            arguments += " --save-interval 1000 --no-load-rng"
            arguments += f" --exit-interval {last}" if last != LAST else ""
        name = "-".join(str(case).replace("+", "").split(", ")).replace(" ", "_")
        name += "".join(f"-{change.rsplit('.', 1)[1]}" for change in changes)
        name += f"-{last}" if last != LAST else ""
        if not changes:
            watched = case in WATCHED
            changes = (f"{MONITOR_CHANGES}.{'keep_counts' if watched else 'forbid_the_monitor'}",)
            arguments += f" --monitor-layers all --monitor-interval {FIRST}" if watched else ""
        return jobs.run(name, arguments, case.ranks, changes=changes)

    return cached


@pytest.fixture(scope="session")
def report():
    """Collect what was reached; ``MEGATRON_PERILN_REPORT`` names the page to write it to."""
    reached = {}
    yield reached
    if "MEGATRON_PERILN_REPORT" in os.environ:
        Path(os.environ["MEGATRON_PERILN_REPORT"]).write_text(page(reached, LAST - FIRST + 1))
