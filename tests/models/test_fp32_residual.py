"""``--fp32-residual-connection`` with Transformer Engine: fp32 into its norms, the parameters' dtype out."""

import pytest
import torch

from megatron_periln.models import HybridModelConfig
from megatron_periln.models.hybrid import _final_norm
from megatron_periln.models.place_norms import place_norms
from megatron_periln.norms import EngineInputNorm, InputNorm, NormPlacement
from tests.models import engine, small

pytestmark = pytest.mark.usefixtures("single_process")

KINDS = {
    "rmsnorm": small.SWIGLU,
    "layernorm-biases": {"normalization": "LayerNorm", "add_bias_linear": True},
    "recomputed": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
    "moe": {"num_moe_experts": 2, "moe_layer_freq": [0, 1], "moe_ffn_hidden_size": 16},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_placement = pytest.mark.parametrize("placement", small.PLACEMENTS)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, te_specs):
    engine.stand_in(monkeypatch)


def build(placement, kind, implementation="transformer_engine", fp32=True, **changes):
    options = {"params_dtype": torch.bfloat16, "bf16": True, "pipeline_dtype": torch.bfloat16}
    transformer = small.transformer_config(
        **options, **KINDS[kind], transformer_impl=implementation, fp32_residual_connection=fp32
    )
    return small.build(placement, transformer, **changes)


@each_kind
@each_placement
def test_it_trains_as_the_local_layers_do(kind, placement):
    theirs = small.perturb(build(placement, kind))
    local = build(placement, kind, "local")
    engine.load_as_local(local, theirs.state_dict())
    assert torch.equal(small.run(theirs), small.run(local))
    expected = small.gradients(local)
    actual = engine.as_local(small.gradients(theirs))
    assert actual.keys() == expected.keys()
    assert max(small.relative_error(actual[name], expected[name]) for name in expected) == 0
    assert min(gradient.abs().max() for gradient in actual.values()) > 0


@each_kind
@each_placement
def test_a_checkpoint_has_the_same_keys(kind, placement):
    def keys(fp32):
        saved = build(placement, kind, fp32=fp32).sharded_state_dict().values()
        return {part.key for part in saved if hasattr(part, "key")}

    assert keys(True) == keys(False)


@each_placement
def test_every_norm_of_the_stream_sees_fp32_and_gives_the_parameters_dtype(placement):
    model = build(placement, "moe")
    seen = []
    for norm in model.modules():
        if isinstance(norm, InputNorm):
            norm.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0].dtype, out.dtype)))
    small.run(model)
    count = {"pre": 5, "peri": 5, "output": 1, "post": 0}[placement]
    assert seen == count * [(torch.float32, torch.bfloat16)]


def test_what_the_engines_norm_would_round_is_not_rounded():
    x = torch.tensor([[1.0, 1.01, -1.0, 3.011]])
    config = small.transformer_config(hidden_size=4, params_dtype=torch.bfloat16)
    ours, theirs = EngineInputNorm(config), engine.Norm(config, 4)
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.fill_(256)
    assert not torch.equal(ours(x), theirs(x))
    assert theirs.state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize("placement", ["pre", "peri"])
def test_transformer_engine_alone_refuses_the_stream(placement, monkeypatch):
    """As on a GPU, where Pre-LN ended so, too."""
    monkeypatch.setitem(place_norms.__globals__, "_with_norms_of_fp32_stream", lambda layer, _: layer)
    with pytest.raises(TypeError, match=r"Found input dtype: torch\.float32"):
        small.run(build(placement, "rmsnorm"))


def test_the_norm_fused_with_the_residual_is_refused():
    transformer = small.transformer_config(
        transformer_impl="transformer_engine", fp32_residual_connection=True, fused_residual_rmsnorm=True
    )
    for placement in ("pre", "peri"):
        with pytest.raises(ValueError, match=r"--fused-residual-rmsnorm: .* no residual stream in fp32"):
            small.build(placement, transformer)


def test_the_norm_fused_with_the_output_norm_stands_too():
    fused, apart = (small.perturb(build("peri", "rmsnorm", fuse_pre_mlp_norm=fuse)) for fuse in (True, False))
    apart.load_state_dict(fused.state_dict())
    assert small.relative_error(small.run(fused), small.run(apart)) < 1e-6


def test_the_final_norm_of_a_hybrid_model_is_ours_too():
    for fp32 in (False, True):
        transformer = small.transformer_config(
            transformer_impl="transformer_engine", is_hybrid_model=True, fp32_residual_connection=fp32
        )
        config = small.model_config(transformer, "peri", HybridModelConfig)
        config.norm_placement = NormPlacement.named("peri")
        assert (_final_norm(config) is EngineInputNorm) == fp32
