"""What norms have of their own, as data of a rule."""

import json
import math
import re
from argparse import Namespace

import pytest

from megatron_periln.errors import UsageError
from megatron_periln.norms import OUTPUT, PERI, PLACEMENTS, POST, PRE, NormSettings
from megatron_periln.norms.arguments import (
    placement_flags,
    placement_of,
    read_norm_rule,
    set_placement,
    why_rule_does_not_fit,
)
from megatron_periln.norms.settings import Norms
from tests.norms.test_arguments import MODEL, parse, why

MUSE = {
    "embedding": {"weight": False},
    "input": {"zero_centered": True},
    "output": {"weight": False, "epsilon": 1e-8},
}


def test_a_file_gives_them_and_checkpoints_remember_them(tmp_path):
    file = tmp_path / "rule.yaml"
    file.write_text(
        "norms:\n  embedding: {weight: false}\n  input: {zero_centered: true}\n"
        "  output: {weight: false, epsilon: 1e-8}\n"  # which YAML takes for text
    )
    args = parse("--norm-placement", "gated-peri", "--norm-rule", str(file))
    read_norm_rule(args)
    placement = placement_of(args)
    assert placement == PLACEMENTS["gated-peri"].changed({"norms": MUSE})
    assert placement.norms.output == NormSettings(weight=False, epsilon=1e-8)
    assert placement_of(parse(*(word for flag in placement_flags(placement) for word in flag))) == placement
    saved = Namespace()
    set_placement(saved, placement)
    assert placement_of(saved) == placement
    assert placement.structure() == (
        'gated-peri, norms {"input": {"zero_centered": true}, "output": {"weight": false}, '
        '"embedding": {"weight": false}} (with embedding norm)'
    )
    assert {placement: 1}[placement_of(args)] == 1


@pytest.mark.parametrize(
    "text",
    ["norms:\n  2026-01-01: {}", "norms: &a {output: *a}"],
    ids=["a date as a name", "a mapping in itself"],
)
def test_a_file_that_names_no_settings_is_refused(tmp_path, text):
    file = tmp_path / "rule.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match="is no mapping of names to values"):
        read_norm_rule(parse("--norm-rule", str(file)))


def test_an_epsilon_is_no_structure():
    """So that a checkpoint goes on with the same one by flag, and `--finetune` takes another."""
    by_flag, by_rule = PERI.with_options(output_norm_epsilon=1e-6), {"output": {"epsilon": 1e-6}}
    assert PERI.changed({"norms": by_rule}).structure() == by_flag.structure() == PERI.structure()
    assert PERI.changed({"norms": {"output": {"weight": False}}}).structure() != PERI.structure()


def test_what_is_not_given_is_the_models_and_no_change():
    assert Norms.of({"input": {"weight": True, "epsilon": None}, "final": {}}) == Norms() == PERI.norms
    assert PERI.changed({"norms": {"output": {"weight": True}}}) == PERI
    assert PERI.changed({"norms": MUSE}).without_settings == PERI


BAD = {
    "there are no norms outptu; those there are: input, output, after_add, embedding, final": {"outptu": {}},
    "norms can't be 3; they are input, output, after_add, embedding, final, with settings each": 3,
    "norms: output can't be False; it has weight, epsilon, zero_centered, such as {weight: false}": {
        "output": False
    },
    "norms: output has no bias; it has weight, epsilon, zero_centered": {"output": {"bias": False}},
    "norms: output has weight 0, which is true or false": {"output": {"weight": 0}},
    "norms: input has zero_centered 'yes', which is true or false": {"input": {"zero_centered": "yes"}},
    "norms: output has no weight that zero_centered could be about; drop one of them": {
        "output": {"weight": False, "zero_centered": False}
    },
    **{
        f"norms: final has epsilon {epsilon!r}, which is a number above 0": {"final": {"epsilon": epsilon}}
        for epsilon in (0, -1e-5, math.inf, "tiny", True, [1e-5])
    },
}


@pytest.mark.parametrize("message", BAD)
def test_settings_that_are_none(message):
    with pytest.raises(ValueError, match=f"^norm placement 'peri': {re.escape(message)}$"):
        PERI.changed({"norms": BAD[message]})


@pytest.mark.parametrize(
    ("placement", "kind"),
    [(PRE, "output"), (PERI, "after_add"), (OUTPUT, "input"), (POST, "final"), (PRE, "embedding")],
)
def test_settings_of_a_norm_that_the_placement_has_not(placement, kind):
    message = f"^norm placement '{placement.name}' has no {kind.replace('_', ' ')} norm, of which norms has "
    with pytest.raises(ValueError, match=message):
        placement.changed({"norms": {kind: {"weight": False}}})


def test_an_embedding_norm_by_flag_may_have_settings():
    rule = ("--norm-rule", '{"norms": {"embedding": {"weight": false}}}')
    assert not placement_of(
        parse("--norm-placement", "pre", "--embedding-norm", *rule)
    ).norms.embedding.weight
    with pytest.raises(UsageError, match="'peri' has no embedding norm, of which norms has settings"):
        placement_of(parse("--no-embedding-norm", *rule))


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        ({"weight": False}, ["--freeze-output-norm"], "its output norms have no weights to initialize or"),
        (
            {"weight": False},
            ["--output-norm-init", "depth-scaled"],
            "have no weights to initialize or freeze",
        ),
        ({"epsilon": 1e-6}, ["--output-norm-epsilon", "1e-6"], "both give the output norms' epsilon"),
    ],
)
def test_flags_and_settings_of_output_norms_that_contradict_each_other(settings, flags, message):
    rule = PERI.changed({"norms": {"output": settings}})
    words = [word for flag in placement_flags(rule) for word in flag]
    with pytest.raises(UsageError, match=message) as error:
        placement_of(parse(*words, *flags))
    assert "\n" not in str(error.value)


def test_frozen_weights_and_an_epsilon_go_together():
    rule = '{"norms": {"output": {"epsilon": 0.1, "zero_centered": true}}}'
    placement = placement_of(parse("--norm-rule", rule, "--freeze-output-norm"))
    assert placement.settings_of("output") == NormSettings(epsilon=0.1, zero_centered=True)
    assert PERI.with_options(output_norm_epsilon=0.2).settings_of("output") == NormSettings(epsilon=0.2)


def test_norms_without_weights_hold_no_parameters():
    layers, hidden = 3, 10
    without = PERI.changed({"norms": {"output": {"weight": False}, "final": {"weight": False}}})
    saved = PERI.num_parameters(layers, hidden) - without.num_parameters(layers, hidden)
    assert saved == hidden * (2 * layers + 1)
    mixed = PLACEMENTS["mix-ln"].changed({"norms": {"after_add": {"weight": False}}})
    assert PLACEMENTS["mix-ln"].num_parameters(8, 10) - mixed.num_parameters(8, 10) == 10 * 4


def test_one_kernel_has_one_way_to_center_weights():
    centered = {"zero_centered": True}
    assert "zero_centered of --norm-rule is not the same for input and output norms" in why(
        PERI.changed({"norms": {"input": centered}})
    )
    assert why(PERI.changed({"norms": {"input": centered, "output": centered}})) is None


def test_models_made_on_the_meta_device_have_no_start_for_norms_without_weights():
    meta = Namespace(**MODEL, use_megatron_fsdp=True, init_model_with_meta_device=True)
    reason = why_rule_does_not_fit(meta, PERI.changed({"norms": {"output": {"weight": False}}}))
    assert "leaves norms without weights as the memory was; drop it" in reason
    assert why_rule_does_not_fit(meta, PERI) is None


@pytest.mark.parametrize("models", [False, True])
def test_weights_that_are_stored_as_the_models_are_no_other_rule(models):
    """By the rule or by --apply-layernorm-1p: the same kernels, checkpoints and exports."""
    rule = {"norms": {kind: {"zero_centered": models} for kind in ("input", "output", "final")}}
    args = parse("--norm-placement", "peri", "--norm-rule", json.dumps(rule))
    args.layernorm_zero_centered_gamma = models
    assert placement_of(args) == placement_of(parse("--norm-placement", "peri"))
    args.layernorm_zero_centered_gamma = not models
    assert placement_of(args).norms == Norms.of(rule["norms"])
