"""What is changed in rotary embeddings, and whether it is still needed."""

import pytest
import torch

from megatron_periln.patches.rotary import rotated_at
from tests.models import small

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def model():
    return small.build("pre", position_embedding_type="rope").eval()


def logits(model, positions):
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        return model(tokens, positions[None], None)


def test_upstream_still_counts_rotary_positions_from_zero(model):
    near, far = torch.arange(8), 100 * torch.arange(8)
    assert torch.equal(logits(model, near), logits(model, far))


def test_positions_are_those_given(model):
    """What counts is how far apart they are; afterwards all is as before."""
    near, far = torch.arange(8), 100 * torch.arange(8)
    before = logits(model, near)
    with rotated_at(model.rotary_pos_emb, near):
        assert torch.equal(logits(model, near), before)
    with rotated_at(model.rotary_pos_emb, near + 5):
        assert torch.allclose(logits(model, near), before, atol=1e-5)
    with rotated_at(model.rotary_pos_emb, far):
        assert not torch.allclose(logits(model, near), before, atol=1e-5)
    assert torch.equal(logits(model, near), before)
