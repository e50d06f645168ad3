"""Megatron's model with placed norms computes what the formulas say, forward and backward.

Errors are the largest difference over the largest absolute value of the reference's tensor.
Megatron computes in fp32, the reference in fp64.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from megatron_periln.norms import NormPlacement
from tests.models import small
from tests.reference_gpt import ReferenceGPT, Shape, join_qkv, load_megatron, megatron_gradients, split_qkv

pytestmark = pytest.mark.usefixtures("single_process")

TOLERANCE = 1e-5
MISTAKE = 1e-3  # every deliberate mistake below is wrong by more than this
EPS, OUTPUT_EPS = 1e-2, 0.3

FAMILIES = {
    "rmsnorm-swiglu-rope-gqa": {"normalization": "RMSNorm", "gated": True, "groups": 2},
    "layernorm-gelu-biases-learned-tied": {
        "normalization": "LayerNorm",
        "bias": True,
        "rope": False,
        "tied": True,
    },
    "zero-centered-biases-output-eps": {
        "normalization": "RMSNorm",
        "zero_centered_gamma": True,
        "bias": True,
        "groups": 2,
        "other_embedding_norm": True,
        "output_eps": OUTPUT_EPS,
    },
}
EVERY = [*small.PLACEMENTS, *small.RULES]

# Of a family and a placement, what norms have of their own: (weight, epsilon, zero-centered).
RMS, LAYER, CENTERED = FAMILIES
MUSE = {"embedding": (False, None, None), "input": (True, None, True), "output": (False, 0.05, None)}
OWN = {
    "muse": (RMS, "gated-peri", MUSE),
    "peri": (
        RMS,
        "peri",
        {
            "input": (False, 0.3, None),
            "output": (True, 0.05, True),
            "embedding": (True, 0.1, True),
            "final": (True, 0.2, True),
        },
    ),
    "peri, LayerNorm": (LAYER, "peri", dict.fromkeys(("output", "final"), (False, 0.05, None))),
    "output, centered": (CENTERED, "output", {"output": (True, None, False), "final": (False, None, None)}),
    "post, LayerNorm": (LAYER, "post", {"after_add": (False, 0.1, None)}),
    "mix-ln": (RMS, "mix-ln", {"after_add": (False, 0.1, None), "input": (True, 0.05, True)}),
    "ln-scaling, centered": (CENTERED, "ln-scaling", {"input": (True, 0.05, False)}),
}


def given(own):
    """Return settings as a rule's file has them."""
    names = ("weight", "epsilon", "zero_centered")
    return {
        kind: {name: value for name, value in zip(names, of, strict=True) if value is not None}
        for kind, of in own.items()
    }


LAYERS = {"mix-ln": 4}  # of which it has norms after the first one's sublayers
cases = pytest.mark.parametrize(
    ("family", "placement"), [(f, p) for f in FAMILIES for p in small.PLACEMENTS], ids=str
)


@functools.cache
def megatron_and_shape(family, placement_name, own_name=None):
    """Return (logits, loss, gradients), the state dict, and the reference's shape."""
    options, own = FAMILIES[family], OWN[own_name][2] if own_name else {}
    placement = NormPlacement.named(placement_name)
    output_eps = options.get("output_eps") if placement.output else None
    embedding = placement.embedding != options.get("other_embedding_norm", False)
    placement = placement.with_options(embedding=embedding, output_norm_epsilon=output_eps)
    placement = placement.changed({"norms": given(own)})
    gated, bias, rope, tied = (options.get(key, key == "rope") for key in ("gated", "bias", "rope", "tied"))
    transformer = small.transformer_config(
        num_layers=LAYERS.get(placement_name, small.LAYERS),
        normalization=options["normalization"],
        layernorm_epsilon=EPS,
        layernorm_zero_centered_gamma=options.get("zero_centered_gamma", False),
        num_query_groups=options.get("groups", 4),
        add_bias_linear=bias,
        qk_layernorm=placement_name == "hybrid-norm",
        gated_linear_unit=gated,
        activation_func=F.silu if gated else F.gelu,
    )
    model = small.build(
        placement,
        transformer,
        position_embedding_type="rope" if rope else "learned_absolute",
        share_embeddings_and_output_weights=tied,
    )
    small.perturb(model)
    shape = Shape(
        num_layers=transformer.num_layers,
        hidden_size=transformer.hidden_size,
        num_heads=transformer.num_attention_heads,
        num_query_groups=transformer.num_query_groups,
        ffn_hidden_size=transformer.ffn_hidden_size,
        vocab_size=small.VOCABULARY,
        max_positions=small.SEQUENCE,
        placement=placement_name,
        embedding_norm=embedding,
        normalization=transformer.normalization,
        eps=EPS,
        output_eps=output_eps,
        zero_centered_gamma=transformer.layernorm_zero_centered_gamma,
        gated=gated,
        bias=bias,
        rope=rope,
        tied=tied,
        qk_norm=transformer.qk_layernorm,
        own=own,
    )
    results = {"logits": small.run(model, labels=False).detach(), "loss": small.run(model).mean().detach()}
    return {**results, **small.gradients(model)}, model.state_dict(), shape


def errors(family, placement_name, mistake=None, own_name=None, **wrong):
    """Return ``{tensor: error}`` of Megatron against the reference; raise if they have other tensors."""
    megatron, state_dict, shape = megatron_and_shape(family, placement_name, own_name)
    megatron = dict(megatron)
    reference = ReferenceGPT(Shape(**{**vars(shape), **wrong})).double()
    load_megatron(reference, state_dict)
    if mistake:
        mistake(reference)
    ids, labels = small.tokens()
    logits = reference(ids)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    expected = {"logits": logits, "loss": loss, **megatron_gradients(reference)}
    if not wrong:
        assert megatron.keys() == expected.keys()
    # The final norm divides out the last gate, whose gradient is what cancels: here they are one tensor.
    for results in (megatron, expected):
        if gates := [results[name] for name in sorted(results) if name.endswith(".gate")]:
            results["gates"] = torch.cat(gates)
    return {
        name: small.relative_error(megatron[name], expected[name])
        for name in megatron.keys() & expected.keys()
        if not name.endswith(".gate")
    }


@pytest.mark.parametrize(("family", "placement"), [(f, p) for f in FAMILIES for p in EVERY], ids=str)
def test_logits_loss_and_every_gradient_equal_the_reference(family, placement):
    found = errors(family, placement)
    too_far = {name: error for name, error in found.items() if error > TOLERANCE}
    assert not too_far


@pytest.mark.parametrize("own", OWN)
def test_norms_with_settings_of_their_own_equal_the_reference(own):
    found = errors(*OWN[own][:2], own_name=own)
    too_far = {name: error for name, error in found.items() if error > TOLERANCE}
    assert not too_far


@pytest.mark.parametrize("own", OWN)
def test_the_comparison_rejects_norms_without_one_of_their_settings(own):
    """But for weights, which the comparison has no counterpart of where there should be none."""
    family, placement, settings = OWN[own]
    for kind, (has_weight, *others) in settings.items():
        for place in (place for place, value in enumerate(others) if value is not None):
            wrong = (has_weight, *(None if i == place else value for i, value in enumerate(others)))
            found = errors(family, placement, own_name=own, own={**settings, kind: wrong})
            assert max(found.values()) > MISTAKE, (kind, place)


@cases
def test_the_comparison_rejects_every_other_placement(family, placement):
    for other in set(small.PLACEMENTS) - {placement}:
        found = errors(family, placement, placement=other)
        assert found["logits"] > MISTAKE and found["loss"] > MISTAKE, other


@pytest.mark.parametrize("rule", small.RULES)
def test_the_comparison_rejects_the_rule_that_is_most_like_one(rule):
    found = errors(next(iter(FAMILIES)), rule, placement=small.RULES[rule])
    assert found["logits"] > MISTAKE and found["loss"] > MISTAKE


@cases
def test_the_comparison_rejects_another_eps(family, placement):
    assert max(errors(family, placement, eps=1e-5).values()) > MISTAKE
    if placement != "pre":
        own = OUTPUT_EPS if megatron_and_shape(family, placement)[2].output_eps is None else EPS
        assert max(errors(family, placement, output_eps=own).values()) > MISTAKE


@cases
def test_the_comparison_rejects_a_toggled_embedding_norm(family, placement):
    shape = megatron_and_shape(family, placement)[2]
    found = errors(family, placement, embedding_norm=not shape.embedding_norm)
    assert found["logits"] > MISTAKE


def put_norms_before_the_biases(reference):
    """Make every output norm see its sublayer's output without the bias, which is added to what it gives."""
    for layer in reference.layers:
        for norm, linear in (
            (layer.attention_output_norm, layer.attention.out),
            (layer.mlp_output_norm, layer.mlp.down),
        ):
            norm.register_forward_pre_hook(lambda _, args, bias=linear.bias: (args[0] - bias,))
            norm.register_forward_hook(lambda _, __, output, bias=linear.bias: output + bias)


@pytest.mark.parametrize("placement", ["post", "peri", "output"])
@pytest.mark.parametrize("family", [name for name, options in FAMILIES.items() if options.get("bias")])
def test_the_comparison_rejects_a_norm_before_the_bias(family, placement):
    found = errors(family, placement, mistake=put_norms_before_the_biases)
    assert found["logits"] > MISTAKE and found["loss"] > MISTAKE


def test_splitting_a_fused_qkv_weight_undoes_joining():
    _, state_dict, shape = megatron_and_shape(next(iter(FAMILIES)), "pre")
    fused = state_dict["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert torch.equal(join_qkv(*split_qkv(fused, shape), shape), fused)
