"""Evaluation computes what training computes, and keeps nothing for a backward pass."""

import json

import pytest
import torch
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from tests.models import small

pytestmark = pytest.mark.usefixtures("single_process")

KINDS = {"dense": {}, "biases": {"add_bias_linear": True}, "mtp": {"mtp_num_layers": 1}}

each_kind = pytest.mark.parametrize("kind", KINDS)
each_placement = pytest.mark.parametrize("placement", small.PLACEMENTS)


def build(kind, placement):
    return small.perturb(small.build(placement, small.transformer_config(**KINDS[kind])))


def evaluate(model):
    """Evaluate under no_grad; return logits, layer outputs, and the number of tensors saved for backward."""
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor), lambda _: None)
    with torch.no_grad(), hooks, small.layer_outputs(model) as outputs:
        logits = small.run(model.eval(), labels=False)
    return logits, outputs, len(saved)


def upstreams_grad_mode(model):
    """Make every layer run its bias-dropout-adds under enable_grad, as Megatron does by itself."""
    for layer in model.modules():
        if isinstance(layer, TransformerLayer):
            layer.bias_dropout_add_exec_handler = torch.enable_grad


# Placement pre is stock Megatron, whose bias adds make the outputs require gradients.
@pytest.mark.parametrize(
    ("kind", "placement"),
    [(k, p) for k in KINDS for p in small.PLACEMENTS if (k, p) != ("biases", "pre")],
)
def test_evaluation_under_no_grad_saves_nothing(kind, placement):
    logits, outputs, saved = evaluate(build(kind, placement))
    assert saved == 0
    assert not logits.requires_grad
    assert len(outputs) == small.LAYERS
    assert not any(output.requires_grad for output in outputs)


@each_kind
@pytest.mark.parametrize("placement", ["post", "peri", "output"])
def test_with_upstreams_grad_mode_evaluation_would_keep_the_graph(kind, placement):
    model = build(kind, placement)
    upstreams_grad_mode(model)
    _, outputs, saved = evaluate(model)
    assert saved > 0
    assert all(output.requires_grad for output in outputs)


def block(missing=None):
    """Return the description of a layer without its attention or its MLP."""
    attention = {"n_heads_in_group": None if missing == "attention" else 1}
    mlp = {"ffn_mult": None if missing == "mlp" else 1.5}
    return {
        "attention": {**attention, "no_op": missing == "attention", "replace_with_linear": False},
        "ffn": {**mlp, "no_op": missing == "mlp", "replace_with_linear": False},
    }


@pytest.mark.parametrize("missing", ["attention", "mlp"])
@pytest.mark.parametrize("placement", ["post", "peri", "output"])
def test_a_layer_of_one_sublayer_saves_nothing_either(placement, missing):
    blocks = json.dumps({"block_configs": [block(missing), block()]})
    transformer = small.transformer_config(
        HeterogeneousTransformerConfig, heterogeneous_layers_config_encoded_json=blocks
    )
    model = small.perturb(small.build(placement, transformer))
    norms = {name for name, _ in model.named_parameters() if "layers.0." in name and "_bda." in name}
    present = "mlp" if missing == "attention" else "self_attn"
    assert norms == {f"decoder.layers.0.{present}_bda.norm.weight"}
    assert all(gradient.any() for gradient in small.gradients(model).values())
    _, outputs, saved = evaluate(model)
    assert saved == 0
    assert not any(output.requires_grad for output in outputs)


@each_kind
@each_placement
def test_evaluation_equals_training_without_dropout(kind, placement):
    model = build(kind, placement)
    trained = small.run(model.train(), labels=False)
    evaluated, _, _ = evaluate(model)
    assert torch.equal(trained, evaluated)


@each_placement
def test_dropout_acts_in_training_only(placement):
    transformer = small.transformer_config(hidden_dropout=0.5, attention_dropout=0.5)
    model = small.perturb(small.build(placement, transformer))
    without = small.perturb(small.build(placement))
    without.load_state_dict(model.state_dict())
    assert torch.equal(evaluate(model)[0], evaluate(without)[0])
    first, second = (small.run(model.train(), labels=False) for _ in range(2))
    assert not torch.equal(first, second)
