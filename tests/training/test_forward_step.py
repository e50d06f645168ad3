"""The loss that the forward step reports."""

from argparse import Namespace

import pytest
import torch
from megatron.core.rerun_state_machine import (
    RerunMode,
    destroy_rerun_state_machine,
    initialize_rerun_state_machine,
)

from megatron_periln.training import forward_step
from megatron_periln.training.forward_step import loss_function

LOSSES = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])


@pytest.fixture
def checks(monkeypatch):
    """Megatron's arguments that say what to check, and what watches the results."""
    args = Namespace(check_for_nan_in_loss_and_grad=True, check_for_spiky_loss=False)
    monkeypatch.setattr(forward_step, "get_args", lambda: args)
    initialize_rerun_state_machine(mode=RerunMode.DISABLED)
    yield args
    destroy_rerun_state_machine()


@pytest.mark.parametrize(
    "mask, total, tokens",
    [
        ([[1, 1, 1], [1, 1, 1]], 63.0, 6),
        ([[1, 0, 1], [0, 0, 1]], 37.0, 3),
        ([[0, 0, 0], [0, 0, 0]], 0.0, 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_loss_is_summed_over_the_tokens_that_count(checks, mask, total, tokens, dtype):
    loss, count, reported = loss_function(torch.tensor(mask, dtype=dtype), LOSSES)
    assert loss.item() == total
    assert count.item() == tokens
    assert count.dtype == torch.int
    assert list(reported) == ["lm loss"]
    assert reported["lm loss"].tolist() == [total, tokens]


def test_losses_are_summed_in_fp32(checks):
    losses = torch.full((1, 1000), 1.0, dtype=torch.bfloat16)
    loss, _, _ = loss_function(torch.ones(1, 1000), losses)
    assert loss.dtype == torch.float32
    assert loss.item() == 1000.0


def test_gradient_reaches_the_tokens_that_count_only(checks):
    losses = LOSSES.clone().requires_grad_()
    loss, count, reported = loss_function(torch.tensor([[1, 0, 1], [0, 0, 1]]), losses)
    loss.backward()
    assert losses.grad.tolist() == [[1, 0, 1], [0, 0, 1]]
    assert not count.requires_grad
    assert not reported["lm loss"].requires_grad


@pytest.mark.parametrize("bad, message", [("nan", "found NaN"), ("inf", "found Inf")])
def test_bad_loss_ends_the_run(checks, bad, message):
    losses = LOSSES.clone()
    losses[0, 1] = float(bad)
    with pytest.raises(RuntimeError, match=f"{message} in local forward loss calculation"):
        loss_function(torch.ones(2, 3), losses)
    checks.check_for_nan_in_loss_and_grad = False
    assert not loss_function(torch.ones(2, 3), losses)[0].isfinite()


def test_spiky_loss_is_reported_and_the_run_goes_on(checks, caplog):
    checks.check_for_spiky_loss = True
    for _ in range(150):
        loss_function(torch.ones(2, 3), LOSSES)
    assert "Spiky loss" not in caplog.text
    loss_function(torch.ones(2, 3), LOSSES * 11)
    assert "Spiky loss" in caplog.text


@pytest.mark.parametrize(
    ("pattern", "documents"),
    [("M*-", [[0] * 3 + [1] * 2 + [2] * 3]), ("G*-", None), (None, None)],
)
def test_mamba_layers_know_which_document_a_token_is_of(monkeypatch, pattern, documents):
    """Two samples of four tokens: without the number of all tokens their states crossed every document."""
    args = Namespace(seq_length=4, hybrid_layer_pattern=pattern)
    monkeypatch.setattr(forward_step, "get_args", lambda: args)
    monkeypatch.setattr(forward_step, "update_seqlen_stats_from_cu_seqlens", lambda lengths: None)
    bounds = torch.tensor([[0, 3, 5, 8]], dtype=torch.int32)
    batch = {"cu_seqlens": bounds, "max_seqlen": torch.tensor([3]), "cu_seqlens_padded": None}
    packed = forward_step._packed_sequences(batch, 2)
    assert packed.cu_seqlens_q.tolist() == [0, 3, 5, 8]
    assert (packed.seq_idx if documents is None else packed.seq_idx.tolist()) == documents
