"""Placement ``pre`` is stock Megatron bit for bit; the others differ from it by their norms only."""

import pytest
import torch
from megatron.training.models import gpt as stock

from megatron_periln.norms import NormPlacement
from tests.models import small

pytestmark = pytest.mark.usefixtures("single_process")

FAMILIES = {
    "rmsnorm-swiglu-rope": (
        {"normalization": "RMSNorm", "num_query_groups": 2, **small.SWIGLU},
        {"position_embedding_type": "rope"},
    ),
    "layernorm-gelu-biases-learned-tied": (
        {"normalization": "LayerNorm", "add_bias_linear": True},
        {"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True},
    ),
    "moe": (
        {"num_moe_experts": 4, "moe_layer_freq": [0, 1], "moe_router_load_balancing_type": "none"},
        {"position_embedding_type": "rope"},
    ),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def build_ours(family, placement):
    transformer, model = FAMILIES[family]
    return small.build(placement, small.transformer_config(**transformer), **model)


def build_stock(family):
    transformer, model = FAMILIES[family]
    small.seed()
    config = small.model_config(
        small.transformer_config(**transformer), "pre", config_class=stock.GPTModelConfig, **model
    )
    return stock.GPTModelBuilder(config).build_model(small.groups())


def is_norm(name):
    return "norm" in name.split(".")[-2]


def assert_same_tensors(ours, theirs):
    assert list(ours) == list(theirs)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def tensors(state_dict):
    return {name: value for name, value in state_dict.items() if torch.is_tensor(value)}


@each_family
def test_pre_has_the_keys_and_parameters_of_stock_megatron(family):
    ours, theirs = build_ours(family, "pre").state_dict(), build_stock(family).state_dict()
    assert list(ours) == list(theirs)
    assert_same_tensors(tensors(ours), tensors(theirs))


@each_family
def test_pre_trains_as_stock_megatron_bit_for_bit(family):
    models = [build_ours(family, "pre"), build_stock(family)]
    for _ in range(3):
        logits = [small.run(model, labels=False) for model in models]
        assert torch.equal(*logits)
        assert_same_tensors(*(small.gradients(model) for model in models))
        for model in models:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.5 * parameter.grad)
    assert_same_tensors(*(tensors(model.state_dict()) for model in models))
    assert not torch.equal(logits[0], small.run(models[0], labels=False))


@each_family
def test_pre_has_no_module_of_this_package(family):
    names = {type(module).__module__ for module in build_ours(family, "pre").modules()}
    assert not [name for name in names if name.startswith("megatron_periln")]


@each_family
@pytest.mark.parametrize("embedding", [False, True])
def test_peri_adds_two_norms_a_layer_and_shares_every_other_parameter(family, embedding):
    placement = NormPlacement.named("peri").with_options(embedding=embedding)
    pre, peri = (dict(build_ours(family, p).named_parameters()) for p in ("pre", placement))
    added = sum(peri[name].numel() for name in peri.keys() - pre.keys())
    vectors_per_norm = 2 if "layernorm" in family else 1
    assert added == (2 * small.LAYERS + embedding) * small.HIDDEN * vectors_per_norm
    assert_same_tensors({name: peri[name] for name in peri if name in pre}, pre)


@each_family
@pytest.mark.parametrize("placement", small.PLACEMENTS)
def test_all_that_is_no_norm_is_the_same_in_every_placement(family, placement):
    pre, other = (dict(build_ours(family, name).named_parameters()) for name in ("pre", placement))
    assert_same_tensors(*({n: p for n, p in model.items() if not is_norm(n)} for model in (other, pre)))


@each_family
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("placement", small.PLACEMENTS)
def test_num_parameters_counts_the_norms_of_the_built_model(family, placement, embedding):
    placement = NormPlacement.named(placement).with_options(embedding=embedding)
    model = build_ours(family, placement)
    counted = sum(p.numel() for name, p in model.named_parameters() if is_norm(name))
    normalization = model.config.normalization
    assert placement.num_parameters(small.LAYERS, small.HIDDEN, normalization) == counted > 0


@each_family
@pytest.mark.parametrize("placement", ["post", "peri", "output"])
def test_every_other_placement_computes_something_else_than_pre(family, placement):
    pre, other = (build_ours(family, name) for name in ("pre", placement))
    assert small.run(pre).mean().item() != small.run(other).mean().item()
    logits = [small.run(model, labels=False) for model in (other, pre)]
    assert small.relative_error(*logits) > 0.05
