import sysconfig
from pathlib import Path

import numpy as np
import pytest

from tests.parallel.jobs import Jobs


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
    server = Jobs(tmp_path_factory.mktemp("jobs"), indexed_bytes)
    yield server
    server.close()
