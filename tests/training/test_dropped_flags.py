"""Settings that Megatron parses, prints and drops act, are refused, or are named as without effect."""

import pytest
import torch

from megatron_periln.errors import UsageError
from megatron_periln.training.dropped_flags import make_flags_act
from tests.training import flag_trials as trials

pytestmark = pytest.mark.usefixtures("single_process", "launched")


@pytest.fixture
def launched(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")


def arguments(model, flags=""):
    return trials.parse(f"{trials.MODELS[model]} {flags}")[0]


@pytest.mark.parametrize("model", ["dense", "moe", "hybrid"])
def test_rope_is_scaled_by_the_factor_that_was_asked_for(model):
    frequencies = {}
    for factor in (8, 32):
        args = arguments(model, f"--use-rope-scaling --rope-scaling-factor {factor} --kv-channels 64")
        frequencies[factor] = trials.build(args).rotary_pos_emb.inv_freq
    plain = trials.build(arguments(model, "--kv-channels 64")).rotary_pos_emb.inv_freq
    assert torch.equal(frequencies[8][0], plain[0])
    for factor, scaled in frequencies.items():
        assert torch.isclose(scaled[-1], plain[-1] / factor)


@pytest.mark.parametrize("model", trials.MODELS)
def test_all_layers_are_frozen(model):
    frozen = trials.build(arguments(model, "--freeze-all-layers"))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_the_router_s_bias_is_frozen_too():
    flags = "--moe-router-enable-expert-bias --moe-router-score-function sigmoid --freeze-all-layers"
    model = trials.build(arguments("moe", flags))
    assert all(layer.mlp.router.frozen_expert_bias for layer in model.decoder.layers)


@pytest.mark.parametrize("model", ["dense", "moe", "hybrid"])
def test_queries_and_keys_have_l2_norms(model):
    layer = trials.build(arguments(model, "--qk-l2-norm")).decoder.layers[0]
    query, key = layer.self_attention.q_layernorm, layer.self_attention.k_layernorm
    states = torch.randn(3, 2, 4, 8)
    for norm in (query, key):
        assert torch.allclose(norm(states).pow(2).mean(-1), torch.ones(3, 2, 4), atol=1e-3)


@pytest.mark.parametrize("model", ["dense", "moe", "hybrid"])
def test_swiglu_is_clamped(model):
    plain = trials.run(arguments(model))
    clamped = trials.run(arguments(model, "--activation-func-clamp-value 0.1"))
    by_hand = trials.run(arguments(model, "--activation-func-clamp-value 0.1 --no-bias-swiglu-fusion"))
    assert clamped.loss == by_hand.loss
    assert not trials.close(clamped.loss, plain.loss)


def test_rotary_base_and_percent_reach_latent_attention():
    config = trials.build(arguments("mla", "--rope-type rope --rotary-base 500 --rotary-percent 0.5")).config
    assert (config.rotary_base, config.rotary_percent) == (500, 0.5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--use-flash-attn", "--use-flash-attn (megatron-core reads it no more"),
        ("--moe-router-topk 3", "--moe-router-topk (it needs --num-experts)"),
        ("--bert-load x", "--bert-load (it belongs to retrievers, and this trains GPT-style models)"),
        ("--activation-func-clamp-value 0.1", "SwiGLU is computed without its fused kernel"),
        (
            "--use-mup --mup-base-hidden-size 16 --mup-embedding-mult 3",
            "--mup-embedding-mult 3 changes nothing but the embedding norm's epsilon",
        ),
        (
            f"{trials.MOE} --moe-router-topk-scaling-factor 2.5",
            "--moe-router-topk-scaling-factor changes nothing but the output norms' epsilon",
        ),
    ],
)
def test_what_changes_nothing_is_named(flags, said):
    _, output = trials.parse(f"{trials.GQA} {flags}")
    assert said in output
    assert said not in trials.parse(trials.GQA)[1]


def test_what_a_norm_cancels_is_not_named_without_the_norm():
    mup = "--use-mup --mup-base-hidden-size 16 --mup-embedding-mult 3 --no-embedding-norm"
    assert "--mup-embedding-mult 3 changes" not in trials.parse(f"{trials.GQA} {mup}")[1]
    scaling = f"{trials.MOE} --moe-router-topk-scaling-factor 2.5 --norm-placement pre"
    assert "--moe-router-topk-scaling-factor changes" not in trials.parse(f"{trials.GQA} {scaling}")[1]


@pytest.mark.parametrize("kind", ["none", "rope", "yarn --rotary-scaling-factor 4"])
def test_no_position_embedding_says_nothing_beside_its_type(kind):
    """Megatron refuses it beside any type but rope."""
    args = arguments("dense", f"--position-embedding-type {kind} --no-position-embedding")
    assert args == arguments("dense", f"--position-embedding-type {kind}")


@pytest.mark.parametrize(
    ("model", "flags", "error"),
    [
        (
            "dense",
            "--apply-residual-connection-post-layernorm",
            "reads it no more; drop it, --norm-placement",
        ),
        ("dense", "--openai-gelu", "reads it no more"),
        ("dense", "--position-embedding-type learned_absolute --no-position-embedding", "type none, or rope"),
        ("dense", "--dist-ckpt-save-pre-mcore-014", "reads it no more; drop it"),
        ("dense", "--exit-signal-handler-for-dataloader", "give --exit-signal-handler"),
        ("dense", "--rope-scaling-factor 32", "--rope-scaling-factor needs --use-rope-scaling"),
        ("mla", "--use-rope-scaling", "with --multi-latent-attention give --rope-type yarn"),
        ("mla", "--position-embedding-type yarn", "--rope-type yarn for YaRN"),
        ("mla", "--no-rope-freq 2", "does not reach --multi-latent-attention"),
        ("hybrid", "--no-rope-freq 2", "does not reach hybrid models"),
        ("hybrid", "--mtp-num-layers 1", "give --hybrid-layer-pattern MAIN/MTP"),
        ("dense", "--qk-l2-norm --qk-layernorm", "two norms of queries and keys"),
        ("dense", "--checkpoint-activations", "give --recompute-activations"),
        ("dense", "--config-logger-dir x", "can't copy the process groups"),
    ],
)
def test_what_can_not_act_is_refused(model, flags, error):
    with pytest.raises(UsageError, match=error):
        arguments(model, flags)


def test_evaluation_has_the_interval_that_recipes_rely_on():
    """The default of Megatron before 0.16; without one, megatron-core 0.19 ends in a division by None."""
    args, said = trials.parse(f"{trials.MODELS['dense']} ~--eval-interval --eval-iters 1")
    assert args.eval_interval == 1000
    assert "--eval-interval is not given: 1000" in said
    args, said = trials.parse(f"{trials.MODELS['dense']} ~--eval-interval --eval-iters 0")
    assert args.eval_interval == 1000
    assert "--eval-interval" not in said
    args, _ = trials.parse(f"{trials.MODELS['dense']} --eval-interval 7")
    assert args.eval_interval == 7


@pytest.mark.parametrize(
    "spec",
    [
        "megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec",
        "megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec",
    ],
)
def test_the_default_stack_of_hybrid_models_may_be_named(spec):
    """As recipes of pretrain_hybrid.py and pretrain_mamba.py do; it is Transformer Engine's."""
    plain = trials.run(arguments("hybrid"))
    named = trials.run(arguments("hybrid", f"--spec {spec}"))
    assert named.loss == plain.loss


@pytest.mark.parametrize(("fsdp", "meta"), [("", False), ("--use-megatron-fsdp", True)])
def test_weights_are_initialized_where_the_meta_device_would_leave_them_as_they_are(fsdp, meta):
    flags = f"{trials.COMMON} {trials.GQA} --init-model-with-meta-device {fsdp} --ckpt-format fsdp_dtensor"
    args = trials.parser().parse_args(flags.split())
    make_flags_act(args)
    assert args.init_model_with_meta_device is meta
    if not meta:
        plain = trials.run(arguments("dense"))
        args, said = trials.parse(f"{trials.GQA} --init-model-with-meta-device")
        assert trials.run(args).start == plain.start
        assert "initialized as without this flag" in said


def test_the_signal_that_would_end_a_run_unsaved_has_it_saved():
    args, said = trials.parse(f"{trials.GQA} --exit-signal-handler-for-training")
    assert (args.exit_signal_handler, args.exit_signal_handler_for_training) == (True, False)
    assert "--exit-signal-handler is taken, which saves after the step" in said
