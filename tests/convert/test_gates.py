"""The learned rules beside transformers' classes."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from megatron_periln.norms import PLACEMENTS, kernels
from tests.models import small

RULES = Path(__file__).parents[2] / "docs" / "rules.md"


def test_gates_are_those_of_muse():
    from transformers.models.muse_spark import modeling_muse_spark

    config = SimpleNamespace(hidden_size=6, residual_gate_temperature=0.3)
    theirs = modeling_muse_spark.MuseSparkResidualGate(config)
    gate = torch.tensor([-4.0, -0.3, 0.0, 0.2, 0.9, 30.0])
    theirs.gate.data = gate
    x, y = torch.randn(2, 5, 6)
    a, b = kernels.gate_scales(gate)
    torch.testing.assert_close(a * x + b * y, theirs(x, y))
    torch.testing.assert_close(a[:-1] ** 2 + b[:-1] ** 2, torch.ones(5))
    assert a[-1].item() == pytest.approx(1e-3**0.5)
    a, b = kernels.gate_scales(gate + 0.01)  # negative control
    assert not torch.allclose(a * x + b * y, theirs(x, y))


class Mixes(nn.Module):
    """Stands for attention: it returns what theirs does, and mixes channels alone."""

    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)

    def forward(self, hidden_states, **_):
        return self.linear(hidden_states), None


def muse(monkeypatch, size, width):
    """Return transformers' layer with random weights of norms and gates, with `Mixes` as its attention."""
    from transformers.models.muse_spark import modeling_muse_spark as theirs

    monkeypatch.setattr(theirs, "MuseSparkTextAttention", lambda config, layer_idx: Mixes(config.hidden_size))
    config = SimpleNamespace(
        hidden_size=size,
        intermediate_size=width,
        hidden_act="silu",
        mlp_layer_types=["dense"],
        rms_norm_eps=1e-2,
        post_norm_eps=0.3,
        residual_gate_temperature=0.3,
    )
    layer = theirs.MuseSparkTextDecoderLayer(config, 0)
    embedding = theirs.MuseSparkTextNormedEmbedding(4, size, None, config.rms_norm_eps)
    for name, parameter in layer.named_parameters():
        if "norm" in name or "gate.gate" in name:
            parameter.data.normal_(0, 0.3)
    return layer, embedding


def documented_rule():
    """Return the rule of docs/rules.md, with another epsilon, which shows."""
    (text,) = re.findall(r"```yaml\n(# Muse.*?)```", RULES.read_text(), re.DOTALL)
    rule = yaml.safe_load(text)
    assert float(rule["norms"]["output"]["epsilon"]) == 1e-8
    rule["norms"]["output"]["epsilon"] = 0.3
    return rule


@pytest.mark.parametrize(
    ("change", "equal"),
    [({}, True), ({"output": {"weight": False}}, False), ({"input": {}}, False)],
    ids=["as documented", "another epsilon", "other weights"],
)
def test_the_documented_rule_is_that_of_muse(single_process, monkeypatch, change, equal):
    """A layer and the embedding's norm; the weights in front of its last norm are in the MLP's projection."""
    theirs, embedding = muse(monkeypatch, small.HIDDEN, 24)
    rule = documented_rule()
    rule["norms"] |= change
    config = small.transformer_config(layernorm_epsilon=1e-2)
    model = small.build(PLACEMENTS["gated-peri"].changed(rule), config)
    mine, x = model.decoder.layers[0], torch.randn(5, 1, small.HIDDEN)
    mine.input_layernorm.weight.data = theirs.input_layernorm.weight
    mine.pre_mlp_layernorm.weight.data = theirs.pre_feedforward_layernorm.weight
    mine.self_attn_bda.norm.channel_gate.data = theirs.post_attention_residual_gate.gate
    mine.mlp_bda.norm.channel_gate.data = theirs.post_feedforward_residual_gate.gate
    expected = theirs(x)
    down = theirs.mlp.down_proj.weight.data
    down *= 1 + theirs.post_feedforward_layernorm.weight.data[:, None]
    attended, _ = theirs.self_attn(mine.input_layernorm(x))
    stream = mine.self_attn_bda(True, False)((attended, None), x, 0.0)
    added = theirs.mlp(mine.pre_mlp_layernorm(stream))
    stream = mine.mlp_bda(True, False)((added, None), stream, 0.0)
    assert torch.allclose(stream, expected, rtol=1e-5, atol=1e-5) == equal
    ids = torch.arange(4)
    table = embedding.weight.data
    torch.testing.assert_close(model.embedding.norm(table), embedding(ids))
    assert not list(model.embedding.norm.parameters())
