"""muP (``--use-mup``) with output norms: what Megatron scales by width, and what then stays as it was."""

import numpy as np
import pytest
import torch
from megatron.core.optimizer import (
    OptimizerConfig,
    _get_param_groups,
    get_mup_config_overrides,
    get_standard_config_overrides,
)

from tests.models import small

pytestmark = pytest.mark.usefixtures("single_process")

BASE = 32
RATE = 1e-4
KINDS = {
    "rms": {**small.SWIGLU},
    "layer-norm with biases": {"normalization": "LayerNorm", "add_bias_linear": True},
}


def build(placement, width, mup=True, **options):
    """Build a model whose heads have the same size at every width, as muP has them."""
    scaled = {"use_mup": True, "mup_base_hidden_size": BASE, "mup_base_head_dim": 8} if mup else {}
    sizes = {"hidden_size": width, "ffn_hidden_size": 2 * width, "num_attention_heads": width // 8}
    config = small.transformer_config(**{**small.SWIGLU, **options}, **sizes, kv_channels=8, **scaled)
    return small.build(placement, config)


def groups(model, optimizer="adam"):
    """Return the groups of parameters that Megatron's training loop gives an optimizer."""
    config = OptimizerConfig(optimizer=optimizer, lr=RATE, min_lr=0.0)
    scaled = get_mup_config_overrides(config, model.config.mup_width_mult, optimizer)
    return _get_param_groups([model], config, {**get_standard_config_overrides(config), **scaled})


def rates(model, optimizer):
    """Return the learning rate of each parameter over the base rate, and the factor of its weight decay."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["max_lr"] / RATE, group["wd_mult"])
        for group in groups(model, optimizer)
        for parameter in group["params"]
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer, vector, matrix", [("adam", 1, 1 / 4), ("sgd", 4, 1)])
@pytest.mark.parametrize("placement", small.PLACEMENTS)
def test_every_norm_learns_as_vectors_do(placement, optimizer, vector, matrix, kind):
    """Output norms and the embedding norm too: they need no rule of their own."""
    found = rates(build(placement, 4 * BASE, **KINDS[kind]), optimizer)
    for name, (rate, decay) in found.items():
        is_vector = "norm" in name or name.endswith("bias")
        is_vocabulary = "word_embeddings" in name or "output_layer" in name
        assert rate == pytest.approx(vector if is_vector or is_vocabulary else matrix), name
        assert decay == (0 if is_vector else 1), name
    assert any("_bda.norm." in name for name in found) == (placement != "pre")


def test_norms_begin_with_1_at_every_width():
    for name, parameter in build("peri", 4 * BASE).named_parameters():
        assert "norm" not in name or torch.equal(parameter, torch.ones_like(parameter)), name


def changes_of_layers(placement, width, mup):
    """Return the root mean square by which the layers' outputs change in some steps of Adam."""
    model = build(placement, width, mup)
    options = [{"lr": g["max_lr"], "eps": g.get("eps", 1e-8), "params": g["params"]} for g in groups(model)]
    optimizer = torch.optim.Adam(options)

    def outputs():
        with torch.no_grad(), small.layer_outputs(model) as layers:
            small.run(model)
        return layers

    before = outputs()
    for _ in range(4):
        optimizer.zero_grad()
        small.run(model).mean().backward()
        optimizer.step()
    return [(now - then).square().mean().sqrt().item() for now, then in zip(outputs(), before, strict=True)]


@pytest.mark.parametrize("placement", ["pre", "peri", "output"])
def test_layers_change_as_much_at_every_width(placement):
    """Four times as wide: without muP more than three times as much, with an output norm too."""
    narrow = np.array(changes_of_layers(placement, BASE, mup=True))
    assert np.array(changes_of_layers(placement, BASE, mup=False)) == pytest.approx(narrow)  # the base
    assert changes_of_layers(placement, 4 * BASE, mup=True) / narrow == pytest.approx(1, rel=0.4)
    assert min(changes_of_layers(placement, 4 * BASE, mup=False) / narrow) > 3
