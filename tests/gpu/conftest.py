import pytest
import torch

from tests.conftest import DEVICE


def pytest_collection_modifyitems(items):
    if DEVICE == "cuda" and torch.cuda.is_available():
        return
    reason = "needs a GPU and MEGATRON_PERILN_TEST_DEVICE=cuda (make test-gpu)"
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.skip(reason=reason))
