"""What test_theory.py measures of attention and MLP, of Mamba layers and gated delta nets."""

import functools

import numpy as np
import pytest
import torch

from megatron_periln.norms import NormPlacement
from tests.models import small
from tests.models.test_hybrid import STATEFUL, hybrid
from tests.models.test_theory import bound, line

pytestmark = pytest.mark.usefixtures("single_process")

LAYERS, HIDDEN = 12, 128
MIXERS = {"M": "mixer", "G": "self_attention"}


@pytest.fixture(params=MIXERS)
def symbol(request):
    return request.param


def build(name, symbol, layers=LAYERS, seed=1234):
    return hybrid(
        NormPlacement.named(name).with_options(embedding=False),
        "modern",
        layers // 2,
        pattern=symbol * layers,
        seed=seed,
        hidden_size=HIDDEN,
        layernorm_epsilon=1e-12,
        **STATEFUL,
    )


def tensor(output):
    """Return what a layer gives: Mamba's give a tensor, others a tuple."""
    return output[0] if isinstance(output, tuple) else output


@functools.cache
def variances(name, symbol):
    """Return the residual stream's mean square after each layer at initialization, the mean of 4 seeds."""
    measured = []
    for seed in range(4):
        model, outputs = build(name, symbol, seed=seed), []
        for layer in model.decoder.layers:
            layer.register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(tensor(output)))
        with torch.no_grad():
            small.run(model)
        measured.append([output.square().mean().item() for output in outputs])
    return np.mean(measured, axis=0)


@pytest.mark.parametrize("name", ["peri", "output"])
def test_each_layer_with_an_output_norm_adds_one_to_the_variance_at_initialization(name, symbol):
    slope, explained = line(variances(name, symbol))
    assert slope == pytest.approx(1, rel=0.15)
    assert explained > 0.99


def test_variance_of_pre_ln_grows_by_the_same_amount_a_layer_at_initialization(symbol):
    slope, explained = line(variances("pre", symbol))
    assert slope > 0
    assert explained > 0.98


def test_variance_of_post_ln_does_not_grow(symbol):
    np.testing.assert_allclose(variances("post", symbol), 1, rtol=1e-5)


SCALES = (1.0, 1e2, 1e4)


def last_matrix_gradients(name, symbol):
    """Return, for each scale of h, the gradient of a layer's last matrix W and the norms of h and a = h W.

    One token; the loss is a direction of length 1 times the layer's output.
    """
    layer = build(name, symbol, layers=2).decoder.layers[0]
    matrix = getattr(layer, MIXERS[symbol]).out_proj
    matrix.weight.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(5))
    x, direction = torch.randn(2, 1, 1, HIDDEN, generator=torch.Generator().manual_seed(6))
    measured = []
    for scale in SCALES:
        norms = []

        def massive(_, inputs, scale=scale, norms=norms):
            norms.append((scale * inputs[0]).norm().item())
            return (scale * inputs[0], *inputs[1:])

        hooks = [
            matrix.register_forward_pre_hook(massive),
            matrix.register_forward_hook(lambda _, __, out, norms=norms: norms.append(out[0].norm().item())),
        ]
        layer.zero_grad()
        (tensor(layer(x, attention_mask=None)) * direction / direction.norm()).sum().backward()
        measured.append((matrix.weight.grad.clone(), *norms))
        for hook in hooks:
            hook.remove()
    return measured


def test_the_gradient_of_pre_ln_grows_with_the_activation(symbol):
    measured = last_matrix_gradients("pre", symbol)
    largest = np.array([gradient.abs().max().item() for gradient, _, _ in measured])
    assert largest / largest[0] == pytest.approx(SCALES, rel=1e-5)
    gradient, h, a = measured[-1]
    assert gradient.norm().item() > 10 * bound(h, a)


@pytest.mark.parametrize("name", ["peri", "output"])
def test_the_gradient_with_an_output_norm_does_not_grow_and_keeps_its_bound(name, symbol):
    measured = last_matrix_gradients(name, symbol)
    norms = np.array([gradient.norm().item() for gradient, _, _ in measured])
    assert norms == pytest.approx(norms[0], rel=1e-4)
    assert norms[0] > 0
    assert all(norm <= bound(h, a) for norm, (_, h, a) in zip(norms, measured, strict=True))
