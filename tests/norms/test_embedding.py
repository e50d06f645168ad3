"""The embedding norm in a built model."""

import copy

import pytest
import torch

from megatron_periln.norms import EmbeddingNorm, NormPlacement
from tests.models import small
from tests.norms import formulas

pytestmark = pytest.mark.usefixtures("single_process")

EPS = 0.1


def build(placement="peri", *, pre_process=None, positions="learned_absolute", **changes):
    placement = NormPlacement.named(placement).with_options(embedding=True)
    transformer = small.transformer_config(layernorm_epsilon=EPS, **changes)
    model = small.build(placement, transformer, pre_process=pre_process, position_embedding_type=positions)
    return small.perturb(model)


def embedded(model):
    ids, _ = small.tokens()
    return model.embedding(ids, torch.arange(small.SEQUENCE).expand_as(ids))


def raw(model, ids):
    """Return the embedding without norm or dropout, ``[sequence, batch, hidden]``."""
    embedding = model.embedding
    positions = embedding.position_embeddings.weight if embedding.add_position_embedding else 0
    return (embedding.word_embeddings.weight[ids] + positions).transpose(0, 1)


def normed(model):
    norm = model.embedding.norm
    return formulas.norm(raw(model, small.tokens()[0]), norm.weight, norm.bias, EPS, norm.zero_centered_gamma)


@pytest.mark.parametrize("normalization", formulas.NORMALIZATIONS)
@pytest.mark.parametrize("positions", ["learned_absolute", "rope"])
def test_the_stream_starts_at_the_normed_sum_of_tokens_and_positions(normalization, positions):
    model = build(normalization=normalization, positions=positions)
    torch.testing.assert_close(embedded(model), normed(model).float())


def test_the_first_layer_reads_the_normed_embedding():
    model = build()
    seen = []
    model.decoder.layers[0].register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    small.run(model)
    torch.testing.assert_close(seen[0], normed(model).float())


def test_dropout_acts_on_normed_values():
    model, p = build(hidden_dropout=0.4), 0.4
    dropped, whole = embedded(model.train()), normed(model).float()
    kept = dropped != 0
    assert 0.4 < kept.double().mean() < 0.8
    torch.testing.assert_close(dropped[kept], whole[kept] / (1 - p))
    torch.testing.assert_close(embedded(model.eval()), whole)


@pytest.mark.parametrize("placement", small.PLACEMENTS)
def test_every_placement_can_have_one_and_its_weight_learns(placement):
    gradient = small.gradients(build(placement))["embedding.norm.weight"]
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("normalization", formulas.NORMALIZATIONS)
def test_the_checkpoint_holds_it_with_the_embedding(normalization):
    keys = {key for key in build(normalization=normalization).state_dict() if "embedding.norm" in key}
    biases = {"embedding.norm.bias"} if normalization == "LayerNorm" else set()
    assert keys == {"embedding.norm.weight"} | biases


def test_without_the_option_there_is_none():
    model = small.build(NormPlacement.named("peri").with_options(embedding=False))
    assert not [module for module in model.modules() if isinstance(module, EmbeddingNorm)]
    raw_embedding = model.embedding.word_embeddings.weight[small.tokens()[0]].transpose(0, 1)
    assert torch.equal(embedded(model), raw_embedding)


@pytest.mark.parametrize("mtp_num_layers", [None, 1])
def test_only_the_first_stage_has_one(mtp_num_layers):
    first, later = (build(pre_process=stage, mtp_num_layers=mtp_num_layers) for stage in (True, False))
    assert isinstance(first.embedding.norm, EmbeddingNorm)
    assert hasattr(later, "embedding") == (mtp_num_layers is not None)
    assert not [module for module in later.modules() if isinstance(module, EmbeddingNorm)]


def seen_by_mtp(model):
    """Return what the multi-token prediction layer's own norm is given for the embedding."""
    seen = []
    handle = model.mtp.layers[0].enorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    small.run(model)
    handle.remove()
    return seen[0]


def next_tokens():
    ids = small.tokens()[0].roll(-1, dims=1)
    ids[:, -1] = 0
    return ids


def test_multi_token_prediction_reads_the_embedding_without_the_norm():
    model = build(mtp_num_layers=1, positions="rope")
    expected = raw(model, next_tokens())
    assert torch.equal(seen_by_mtp(model), expected)
    assert (expected - normed(model)).abs().max() > 0.1
    torch.testing.assert_close(embedded(model), normed(model).float())


def test_an_error_in_the_embedding_does_not_leave_the_norm_bypassed():
    model = build(mtp_num_layers=1, positions="rope")
    norm = model.embedding.norm

    def fail(*_):
        if norm.bypassed:
            raise RuntimeError("no such token")

    model.embedding.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no such token"):
        small.run(model)
    assert not norm.bypassed


@pytest.mark.parametrize("mtp_num_layers", [None, 1])
def test_a_copied_model_uses_its_own_norm(mtp_num_layers, monkeypatch):
    group_class = torch.distributed.ProcessGroup
    monkeypatch.setattr(group_class, "__deepcopy__", lambda group, _: group, raising=False)
    model = build(mtp_num_layers=mtp_num_layers, positions="rope")
    before = small.run(model, labels=False)
    twin = copy.deepcopy(model)
    assert torch.equal(small.run(twin, labels=False), before)
    with torch.no_grad():
        twin.embedding.norm.weight.mul_(3)
    assert torch.equal(small.run(model, labels=False), before)
    torch.testing.assert_close(embedded(twin), normed(twin).float())
    torch.testing.assert_close(embedded(model), normed(model).float())
    small.gradients(twin)
    assert model.embedding.norm.weight.grad is None
    if mtp_num_layers:
        assert torch.equal(seen_by_mtp(twin), raw(twin, next_tokens()))


def test_the_norm_of_an_fp32_stream_is_fp32():
    transformer = small.transformer_config(
        bf16=True, params_dtype=torch.bfloat16, fp32_residual_connection=True, layernorm_epsilon=EPS
    )
    model = small.perturb(small.build("peri", transformer))
    assert model.embedding.norm.weight.dtype == torch.bfloat16
    torch.testing.assert_close(embedded(model), normed(model).float())
    assert embedded(model).dtype == torch.float32


def test_speculative_decoding_reads_the_embedding_without_the_norm():
    model = build(mtp_num_layers=1, positions="rope").eval()
    layer, ids = model.mtp.layers[0], small.tokens()[0]
    seen = []
    layer.enorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        layer.forward_single_position(
            hidden_states=torch.randn(1, *ids.shape[:1], small.HIDDEN),
            next_token_ids=ids[:, 1:2],
            position_ids=torch.zeros(ids.shape[0], 1, dtype=torch.long),
            embedding=model.embedding,
        )
    assert torch.equal(seen[0], raw(model, ids[:, 1:2]))
