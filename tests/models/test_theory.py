"""What the paper derives (Kim et al., ICML 2025, sections 3 and 4), measured on the built modules."""

import functools

import numpy as np
import pytest
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

from megatron_periln.models import GPTModelBuilder
from megatron_periln.norms import PERI, NormedBiasDropoutAdd
from tests.models import small

pytestmark = pytest.mark.usefixtures("single_process")

LAYERS, HIDDEN = 12, 128


@functools.cache
def variances(placement):
    """Return the residual stream's mean square after each layer at initialization, the mean of 8 seeds."""
    options = {"hidden_size": HIDDEN, "ffn_hidden_size": 2 * HIDDEN, "layernorm_epsilon": 1e-12}
    config = small.transformer_config(num_layers=LAYERS, init_method_std=0.02, **options, **small.SWIGLU)
    measured = []
    for seed in range(8):
        small.seed(seed)
        model = GPTModelBuilder(small.model_config(config, placement)).build_model(small.groups())
        with torch.no_grad(), small.layer_outputs(model) as outputs:
            small.run(model)
        measured.append([output.square().mean().item() for output in outputs])
    return np.mean(measured, axis=0)


def line(values):
    """Return the slope of the line through ``values``, and the share of their variance that it explains."""
    layers = np.arange(len(values))
    slope, start = np.polyfit(layers, values, 1)
    return slope, 1 - np.var(values - slope * layers - start) / np.var(values)


def test_each_sublayer_of_peri_ln_adds_one_to_the_variance_at_initialization():
    """Var(x_{l+1}) = Var(x_l) + b0: here b0 is 1 a sublayer, whatever the weights."""
    slope, explained = line(variances("peri"))
    assert slope == pytest.approx(2, rel=0.1)
    assert explained > 0.99


def test_variance_of_pre_ln_grows_by_the_same_amount_a_layer_at_initialization():
    slope, explained = line(variances("pre"))
    assert slope > 0
    assert explained > 0.98


def test_variance_of_post_ln_does_not_grow():
    """The negative control: what the two tests above find is not found everywhere."""
    np.testing.assert_allclose(variances("post"), 1, rtol=1e-5)


SCALES = (1.0, 1e2, 1e4)


def last_matrix_gradient(add, scale):
    """Return the gradient of an MLP's last matrix W2, ``[4d, d]``, and the norms of h and of a = h W2.

    One token; the loss is a direction of length 1 times what the residual add gives; ``scale``
    multiplies h, as massive activations do.
    """
    generator = torch.Generator().manual_seed(5)
    h = scale * torch.randn(4 * HIDDEN, generator=generator).relu()
    w2 = (0.02 * torch.randn(4 * HIDDEN, HIDDEN, generator=generator)).requires_grad_()
    residual, direction = torch.randn(2, HIDDEN, generator=generator)
    output = h @ w2
    out = add((output[None, None], None), residual[None, None], 0.0)
    (out[0, 0] @ (direction / direction.norm())).backward()
    return w2.grad, h.norm().item(), output.norm().item()


def pre():
    return get_bias_dropout_add(True, False)


def peri():
    config = small.transformer_config(hidden_size=HIDDEN, layernorm_epsilon=1e-12)
    return NormedBiasDropoutAdd(config, PERI)(True, False)


def bound(h, a):
    """Proposition 3.1 with weights of 1: ``4 sqrt(D) |h| / |a|``."""
    return 4 * HIDDEN**0.5 * h / a


def test_the_gradient_of_pre_ln_grows_with_the_activation():
    largest = [last_matrix_gradient(pre(), scale)[0].abs().max().item() for scale in SCALES]
    assert np.array(largest) / largest[0] == pytest.approx(SCALES, rel=1e-5)


def test_the_gradient_of_peri_ln_does_not_grow_and_keeps_its_bound():
    measured = [last_matrix_gradient(peri(), scale) for scale in SCALES]
    norms = np.array([gradient.norm().item() for gradient, _, _ in measured])
    assert norms == pytest.approx(norms[0], rel=1e-4)
    assert norms[0] > 0
    assert all(norm <= bound(h, a) for norm, (_, h, a) in zip(norms, measured, strict=True))


def test_the_gradient_of_pre_ln_breaks_that_bound():
    """The negative control of the bound."""
    gradient, h, a = last_matrix_gradient(pre(), SCALES[-1])
    assert gradient.norm().item() > 10 * bound(h, a)
