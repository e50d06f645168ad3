"""A checkpoint brings back what decides how its model computes; a run that computes otherwise is refused."""

import copy
from argparse import Namespace

import pytest

from megatron_periln.errors import UsageError
from megatron_periln.training.model_settings import (
    MODEL_SETTINGS,
    adopt_model,
    given_settings,
    refuse_other_model,
)
from tests.training import flag_trials as trials
from tests.training.model import MODEL

OTHERWISE = "--norm-epsilon 0.3 --qk-layernorm --rotary-base 500 --apply-layernorm-1p --use-rope-scaling"


@pytest.fixture(scope="module")
def trained(jobs):
    return jobs.run("otherwise", f"{MODEL} {OTHERWISE} --save-interval 3")


def test_a_checkpoint_s_arguments_bring_back_the_model(trained, jobs):
    """The sizes are given by the model's flags of all jobs; what is in OTHERWISE is not."""
    load = f"--load {trained.folder / 'checkpoints'} --ckpt-step 3 --no-load-rng --use-checkpoint-args"
    assert jobs.run("brought-back", f"{MODEL} {load}").curve == trained.curve[3:]


def test_another_model_is_refused_without_the_checkpoint_s_arguments(trained, jobs):
    load = f"--load {trained.folder / 'checkpoints'} --ckpt-step 3 --no-load-rng"
    refused = jobs.run("another-model", f"{MODEL} {load} --apply-layernorm-1p", succeeds=False)
    (error,) = [line for line in refused.log.splitlines() if line.startswith("error: ")]
    assert (
        "was trained with another model: --norm-epsilon 0.3, and here 1e-05; --qk-layernorm on, and here off;"
        in error
    )
    assert "--rotary-base 500, and here 10000; --use-rope-scaling on, and here off; give what" in error


def arguments(monkeypatch, flags=""):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    return trials.parse(f"{trials.GQA} {flags}")[0]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("--norm-epsilon 0.3", ""),
        ("", "--qk-l2-norm"),
        ("--use-rope-scaling --rope-scaling-factor 32", "--use-rope-scaling"),
        ("--activation-func-clamp-value 0.1", "--activation-func-clamp-value 0.2"),
        (trials.MOE, f"{trials.MOE} --moe-router-topk 3"),
        (trials.MOE, f"{trials.MOE} --moe-router-score-function sigmoid"),
        ("--window-size 8,0", "--window-size 4,0"),
        ("--num-layers 4", ""),
        ("--hybrid-layer-pattern *-*-", "--hybrid-layer-pattern *--*"),
    ],
)
def test_another_setting_is_refused_unless_it_is_meant(monkeypatch, before, now):
    saved, args = arguments(monkeypatch, before), arguments(monkeypatch, now)
    refuse_other_model(saved, copy.copy(saved), "folder")
    with pytest.raises(UsageError, match="in folder was trained with another model: --"):
        refuse_other_model(args, saved, "folder")
    args.allow_model_changes = True
    refuse_other_model(args, saved, "folder")


STACK = "--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec"


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("--moe-router-topk 3", ""),  # of a model without experts
        ("--max-position-embeddings 64", ""),  # of rotary positions
        ("--hybrid-layer-pattern *-*-", ""),  # Megatron's to judge
        ("", "--hybrid-layer-pattern M*- --mamba-state-dim 16"),  # a layer that the GPT has not
        (f"--hybrid-layer-pattern *-*- {STACK}", "--hybrid-layer-pattern *-*-"),  # the default one
    ],
)
def test_what_computes_the_same_is_loaded(monkeypatch, before, now):
    refuse_other_model(arguments(monkeypatch, now), arguments(monkeypatch, before), "folder")


def test_a_clamp_that_did_not_act_is_none(monkeypatch):
    """As in checkpoints of stock Megatron, whose fused SwiGLU does not clamp."""
    saved = arguments(monkeypatch, "--activation-func-clamp-value 0.1")
    saved.bias_swiglu_fusion = True
    refuse_other_model(arguments(monkeypatch), saved, "folder")
    with pytest.raises(UsageError, match=r"--activation-func-clamp-value off, and here 0\.1"):
        refuse_other_model(arguments(monkeypatch, "--activation-func-clamp-value 0.1"), saved, "folder")


def test_an_older_checkpoint_is_compared_as_far_as_it_says_something(monkeypatch):
    args = arguments(monkeypatch)
    refuse_other_model(args, None, "folder")
    refuse_other_model(args, Namespace(), "folder")
    with pytest.raises(UsageError, match=r"--norm-epsilon 0\.5, and here 1e-05"):
        refuse_other_model(args, Namespace(norm_epsilon=0.5), "folder")


def test_every_setting_is_adopted_but_those_that_were_given(monkeypatch):
    args = arguments(monkeypatch, "--norm-epsilon 0.3")
    saved = Namespace(**{name: f"saved {name}" for name in MODEL_SETTINGS})
    given = given_settings(args, trials.parser())
    assert given["layernorm_epsilon"] == 0.3
    adopt_model(args, saved, {"layernorm_epsilon": 0.3})
    assert args.layernorm_epsilon == 0.3
    assert all(getattr(args, name) == f"saved {name}" for name in MODEL_SETTINGS - {"layernorm_epsilon"})
