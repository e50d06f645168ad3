"""Tests that need a GPU. Those marked ``rehearsed`` run on the CPU too, Transformer Engine with stand-ins.

So what is wrong with a test itself shows before it has a GPU.
"""

import importlib.util

import pytest
import torch

from tests.conftest import DEVICE
from tests.models import engine
from tests.models.conftest import te_specs  # noqa: F401

HAVE_GPU = DEVICE == "cuda" and torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    reason = "needs a GPU and MEGATRON_PERILN_TEST_DEVICE=cuda (make test-gpu)"
    for item in items:
        if item.path.parent.name == "gpu" and not HAVE_GPU and not item.get_closest_marker("rehearsed"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def transformer_engine(request, monkeypatch):
    """Transformer Engine, or the stand-ins."""
    if HAVE_GPU:
        if importlib.util.find_spec("transformer_engine") is None:
            pytest.skip("needs Transformer Engine")
        return
    request.getfixturevalue("te_specs")
    engine.stand_in(monkeypatch)
