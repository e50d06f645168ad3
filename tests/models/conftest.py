import pytest
from megatron.core.extensions import transformer_engine as te
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt import gpt_layer_specs as specs

from megatron_periln.norms import kernels
from tests.norms import interpreter


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    interpreter.repeat_less()


@pytest.fixture
def te_specs(monkeypatch):
    """Let Megatron write Transformer Engine specs, also where only placeholders stand for its modules."""
    monkeypatch.setattr(specs, "TESpecProvider", TESpecProvider)
    monkeypatch.setattr(specs, "TENorm", te.TENorm)
    return specs.get_gpt_layer_with_transformer_engine_spec


@pytest.fixture
def restored_backend():
    yield
    kernels.use_backend("auto")
