"""The loss on an indexed dataset."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_periln.errors import UsageError
from megatron_periln.evaluation.loss import mean_loss, token_windows, window_length

DOCUMENTS = [list(range(7)), [50], list(range(20, 33)), list(range(90, 95))]
JOINED = [token for document in DOCUMENTS for token in document]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    prefix = str(tmp_path_factory.mktemp("data") / "numbers")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_windows_join_documents_and_share_one_token(prefix):
    windows = [window.tolist() for window in token_windows(prefix, 5, 100)]
    assert windows == [JOINED[start : start + 6] for start in (0, 5, 10, 15, 20)]
    assert JOINED[25:] == [94]  # 26 tokens: the last one was predicted, and starts no window


def test_windows_are_skipped_and_counted(prefix):
    everything = [window.tolist() for window in token_windows(prefix, 4, 100)]
    assert [window.tolist() for window in token_windows(prefix, 4, 100, count=2, skip=3)] == everything[3:5]


def test_too_short_a_dataset_is_an_error(prefix):
    with pytest.raises(UsageError, match="has tokens for 1 windows of 20, and 2 are needed"):
        list(token_windows(prefix, 20, 100, skip=1))


def test_an_id_outside_the_vocabulary_is_an_error(prefix):
    assert len(list(token_windows(prefix, 5, 95))) == 5
    message = "has the token id 94, and the model's vocabulary has 94; give a dataset"
    with pytest.raises(UsageError, match=f"{prefix} {message}"):
        list(token_windows(prefix, 25, 94))


def test_a_window_is_as_long_as_asked_or_as_the_model_allows():
    assert window_length(None, 256) == 256
    assert window_length(None, 131072) == 4096
    assert window_length(512, 256) == 512


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_mean_loss_is_the_cross_entropy_of_every_token(prefix, batch):
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(100, 100, generator=generator)
    loss = mean_loss(lambda tokens: table[tokens], token_windows(prefix, 5, 100), batch)
    inputs, targets = torch.tensor(JOINED[:25]), torch.tensor(JOINED[1:26])
    assert loss.tokens == 25
    assert loss.nats == pytest.approx(F.cross_entropy(table[inputs], targets).item(), rel=1e-6)


def test_uniform_logits_give_the_logarithm_of_the_vocabulary(prefix):
    loss = mean_loss(lambda tokens: torch.zeros(*tokens.shape, 100), token_windows(prefix, 5, 100))
    assert loss.nats == pytest.approx(math.log(100))
    assert str(loss) == "4.605170 nats per token, perplexity 100, 25 tokens"
