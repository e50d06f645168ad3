"""Dropout inside the fused kernel: the right share, replayed in the backward pass and from a seed."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_periln.norms.kernels import fused
from megatron_periln.norms.kernels.launch_config import LaunchConfig
from tests.norms import kernel_cases as cases
from tests.norms.kernel_cases import DEVICE, Case, evaluate, exact, worst_in_roundings

P = 0.3


def draw_mask(rows=64, hidden=256, p=P, seed=1):
    """Return what dropout multiplies with: 0, or 1/(1-p)."""
    ones, zeros = torch.ones(rows, hidden, device=DEVICE), torch.zeros(rows, hidden, device=DEVICE)
    torch.manual_seed(seed)
    return fused.norm_add(ones, None, zeros, ones[0], None, 1e-12, False, p, True)


def generator_state():
    return torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_right_share_is_kept_and_scaled_up(p):
    mask = draw_mask(200, 256, p)
    kept = mask != 0
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)))
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 4 * deviation


def test_rows_and_columns_are_independent():
    kept = (draw_mask(256, 256, 0.5) != 0).double() - 0.5
    for products in (kept[1:] * kept[:-1], kept[:, 1:] * kept[:, :-1], kept * kept.T, kept * kept.flip(0)):
        off_diagonal = products[~torch.eye(*products.shape, dtype=torch.bool, device=DEVICE)]
        assert abs(4 * off_diagonal.mean().item()) < 4 / off_diagonal.numel() ** 0.5 * 2**0.5


@pytest.mark.parametrize(
    ("block", "layer_norm", "sublayer_bias"),
    [(128, False, False), (128, False, True), (128, True, False), (32, True, True)],
)
def test_the_backward_pass_drops_what_the_forward_pass_dropped(block, layer_norm, sublayer_bias, monkeypatch):
    monkeypatch.setattr(fused, "choose_launch_config", lambda *_: LaunchConfig(block, 1, 1, 1))
    case = Case((7, 3), 96, layer_norm=layer_norm, sublayer_bias=sublayer_bias)
    inputs, grad = case.tensors()
    mask = draw_mask(21, 96, seed=5).view(7, 3, 96).cpu()
    torch.manual_seed(5)
    mine = evaluate(fused.norm_add, inputs, grad, case, dropout=P)
    assert worst_in_roundings(mine, exact(inputs, grad, case, mask=mask)) < 1
    other_mask = draw_mask(21, 96, seed=6).view(7, 3, 96).cpu()
    assert cases.errors(mine, exact(inputs, grad, case, mask=other_mask))["d sublayer_output"] > 0.1


def test_a_seed_replays_and_another_does_not():
    first, again, other = (draw_mask(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_call_draws_anew():
    torch.manual_seed(1)
    ones = torch.ones(8, 64, device=DEVICE)
    first, second = (fused.norm_add(ones, None, ones, ones[0], None, 1e-12, False, P, True) for _ in "12")
    assert not torch.equal(first, second)


@pytest.mark.parametrize("tile", [(128, 2), (32, 1)], ids=["whole rows", "rows in parts"])
def test_the_mask_does_not_depend_on_the_launch_config(tile, monkeypatch):
    whole = draw_mask(16, 128)
    monkeypatch.setattr(fused, "choose_launch_config", lambda *_: LaunchConfig(*tile, 1, 1))
    assert torch.equal(whole, draw_mask(16, 128))


def test_the_first_rows_of_a_longer_sequence_are_dropped_alike():
    assert torch.equal(draw_mask(64), draw_mask(96)[:64])


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
def test_without_dropout_nothing_is_drawn_or_dropped(p, training):
    case = Case()
    inputs, grad = case.tensors()
    before = generator_state()
    result = fused.norm_add(*inputs, case.eps, False, p, training)
    assert torch.equal(generator_state(), before)
    assert torch.equal(result, evaluate(fused.norm_add, inputs, grad, case)["out"])


def test_with_everything_dropped_the_residual_passes():
    case = Case()
    inputs, grad = case.tensors()
    mine = evaluate(fused.norm_add, inputs, grad, case, dropout=1.0)
    assert torch.equal(mine["out"], inputs[2])
    assert not mine["d sublayer_output"].any() and not mine["d weight"].any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_replays_bit_for_bit(reentrant):
    case = Case((33,), 160, torch.bfloat16, torch.bfloat16, layer_norm=True, sublayer_bias=True)
    inputs, grad = case.tensors()

    def recomputed(*arguments):
        return checkpoint(fused.norm_add, *arguments, use_reentrant=reentrant)

    results = []
    for function in (fused.norm_add, recomputed):
        torch.manual_seed(3)
        results.append(evaluate(function, inputs, grad, case, dropout=P))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
