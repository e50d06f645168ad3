"""``fuse_pre_mlp_norm``: the same model, with two norms in one kernel."""

import pytest
import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_periln.models import place_norms
from megatron_periln.norms import FusedInputNorm, NormPlacement, kernels
from tests.models import small
from tests.models.test_norm_backends import FULL, KINDS, errors

pytestmark = pytest.mark.usefixtures("single_process", "restored_backend")

BACKENDS = ["torch", "triton"]


def results(backend, fuse, placement="peri", **options):
    """Return the losses and every gradient."""
    kernels.use_backend(backend)
    model = small.perturb(small.build(placement, small.transformer_config(**options), fuse_pre_mlp_norm=fuse))
    small.seed(5)
    return {"losses": small.run(model).detach(), **small.gradients(model)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_two_norms_do(kind, backend):
    alone = results("torch", False, **KINDS[kind])
    assert max(errors(results(backend, True, **KINDS[kind]), alone).values()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_norm_would_show(backend, monkeypatch):
    alone = results("torch", False)
    norm_add_norm = kernels.norm_add_norm

    def off(*arguments):
        out, normed = norm_add_norm(*arguments)
        return out, 1.01 * normed

    monkeypatch.setattr(kernels, "norm_add_norm", off)
    assert max(errors(results(backend, True), alone).values()) > 1e-3


def test_every_norm_before_an_mlp_is_computed_with_the_sum_before_it(monkeypatch):
    alone, fused = [], []
    norm, norm_add_norm = kernels.norm, kernels.norm_add_norm
    monkeypatch.setattr(kernels, "norm", lambda *a: alone.append(0) or norm(*a))
    monkeypatch.setattr(kernels, "norm_add_norm", lambda *a: fused.append(0) or norm_add_norm(*a))
    config = small.transformer_config(layernorm_zero_centered_gamma=True)  # every norm is ours
    for fuse in (False, True):
        model = small.build("peri", config, fuse_pre_mlp_norm=fuse)
        alone.clear()
        small.run(model)
        # Embedding, before attention, and final; and before each MLP.
        assert len(alone) == 2 + small.LAYERS + (0 if fuse else small.LAYERS)
        assert len(fused) == (small.LAYERS if fuse else 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputation_gives_the_same_bits(backend):
    dropout = {"hidden_dropout": 0.3, "attention_dropout": 0.1}
    plain, recomputed = (results(backend, True, **dropout, **options) for options in ({}, FULL))
    assert all(value is None or torch.equal(value, recomputed[name]) for name, value in plain.items())


def test_names_shapes_and_keys_are_those_of_two_norms():
    fused, plain = (small.build("peri", fuse_pre_mlp_norm=fuse) for fuse in (True, False))
    assert [(n, p.shape) for n, p in fused.named_parameters()] == [
        (n, p.shape) for n, p in plain.named_parameters()
    ]
    keys = [
        sorted(shard.key for shard in model.sharded_state_dict().values() if hasattr(shard, "key"))
        for model in (fused, plain)
    ]
    assert keys[0] == keys[1]


def test_a_linear_of_transformer_engine_gives_its_norm_away_but_not_its_name(te_specs):
    config = small.transformer_config()
    layer = place_norms(te_specs(), NormPlacement.named("peri"), config, fuse_pre_mlp_norm=True)
    parts = layer.submodules
    assert parts.pre_mlp_layernorm is FusedInputNorm
    assert parts.mlp.keywords["submodules"].linear_fc1 is te.TEColumnParallelLinear
    assert parts.self_attention.submodules.linear_qkv is te.TELayerNormColumnParallelLinear
    assert parts.sharded_state_dict_keys_map["pre_mlp_layernorm."] == "mlp.linear_fc1.layer_norm_"


@pytest.mark.parametrize("placement", ["pre", "post", "output"])
def test_a_placement_without_both_norms_is_refused(placement):
    with pytest.raises(ValueError, match=f"--norm-placement {placement} has not both norms"):
        small.build(placement, fuse_pre_mlp_norm=True)


@pytest.mark.parametrize(
    "options",
    [
        {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
        {"fine_grained_activation_offloading": True, "offload_modules": ["mlp_norm"]},
    ],
    ids=["recomputed", "offloaded"],
)
def test_what_takes_that_norm_alone_is_refused(options):
    config = small.transformer_config()
    vars(config).update(options)
    with pytest.raises(ValueError, match=f"modules {[*options.values()][1][0]}"):
        place_norms(get_gpt_layer_local_spec(), NormPlacement.named("peri"), config, fuse_pre_mlp_norm=True)
