"""Recomputation in the backward pass changes no gradient."""

import pytest
import torch

from tests.models import small

pytestmark = pytest.mark.usefixtures("single_process")

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
WAYS = {
    "full": FULL,
    "full-one-layer-only": {**FULL, "recompute_method": "block"},
    "norms": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
    "attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}
KINDS = {
    "rmsnorm": {"normalization": "RMSNorm"},
    "layernorm-biases": {"normalization": "LayerNorm", "add_bias_linear": True},
    "dropout": {"normalization": "RMSNorm", "hidden_dropout": 0.3, "attention_dropout": 0.3},
    "mtp": {"mtp_num_layers": 1},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_placement = pytest.mark.parametrize("placement", small.PLACEMENTS)


def build(kind, placement, way=None):
    options = {**KINDS[kind], **(WAYS[way] if way else {})}
    return small.perturb(small.build(placement, small.transformer_config(**options)))


def gradients(model):
    small.seed(5)
    return small.gradients(model)


def count_calls(model, module):
    calls = []
    for layer in model.decoder.layers:
        layer.get_submodule(module).register_forward_hook(lambda *_: calls.append(None))
    return calls


@each_kind
@each_placement
@pytest.mark.parametrize("way", WAYS)
def test_recomputation_gives_the_same_gradients(kind, placement, way):
    plain, recomputed = gradients(build(kind, placement)), gradients(build(kind, placement, way))
    assert plain.keys() == recomputed.keys()
    errors = {name: small.relative_error(recomputed[name], plain[name]) for name in plain}
    if way.startswith("full"):
        assert not [name for name in plain if not torch.equal(plain[name], recomputed[name])]
    assert max(errors.values()) <= 1e-6


@pytest.mark.parametrize(
    ("way", "module", "calls"),
    [
        ("full", "self_attn_bda", 2),
        ("full-one-layer-only", "self_attn_bda", 1.5),
        ("norms", "input_layernorm", 2),
        ("norms", "self_attn_bda", 1),
        ("attention", "self_attention.core_attention", 2),
    ],
)
def test_what_should_be_recomputed_is(way, module, calls):
    model = build("rmsnorm", "peri", way)
    recorded = count_calls(model, module)
    gradients(model)
    assert len(recorded) == calls * small.LAYERS


@each_placement
def test_another_dropout_mask_in_the_recomputation_would_show(placement, monkeypatch):
    from megatron.core.tensor_parallel import random

    plain = gradients(build("dropout", placement))
    monkeypatch.setattr(random, "_set_all_rng_states", lambda *_: None)
    recomputed = gradients(build("dropout", placement, "full"))
    assert max(small.relative_error(recomputed[name], plain[name]) for name in plain) > 1e-2
