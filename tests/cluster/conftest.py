import functools
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.cluster.runs import Trainer
from tests.cluster.slurm import Cluster, missing
from tests.parallel.conftest import indexed_bytes  # noqa: F401


@pytest.fixture(scope="session")
def cluster():
    """SLURM with three nodes."""
    if "MEGATRON_PERILN_TEST_CLUSTER" not in os.environ:
        pytest.skip("make test-cluster runs these")
    if reason := missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="cluster"))  # short: sockets have names of 107 characters
    folder.chmod(0o755)
    with Cluster(folder, 3) as started:
        yield started
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def trainer(cluster, tmp_path_factory, indexed_bytes):  # noqa: F811
    return Trainer(cluster, tmp_path_factory.mktemp("runs"), indexed_bytes)


@pytest.fixture(scope="session")
def undisturbed(trainer):
    """Train once with some flags and ranks, on one machine, from start to end."""

    @functools.cache
    def cached(flags, ranks):
        return trainer.undisturbed(f"undisturbed{ranks}", flags, ranks)

    return cached
