"""From flags and saved arguments to placements, and back."""

import re
from argparse import ArgumentParser, Namespace

import pytest

from megatron_periln.errors import UsageError
from megatron_periln.norms import OUTPUT, PERI, PLACEMENTS, POST, PRE
from megatron_periln.norms.arguments import (
    add_norm_arguments,
    placement_flags,
    placement_of,
    read_norm_rule,
    set_placement,
    why_norms_stay_apart,
    why_rule_does_not_fit,
)
from megatron_periln.norms.kernels import MAX_NORM_ADD_NORM_HIDDEN_SIZE as LONGEST


def parse(*words):
    parser = ArgumentParser()
    add_norm_arguments(parser)
    return parser.parse_args(words)


def test_without_flags_it_is_peri():
    assert placement_of(parse()) == PERI


def test_what_says_nothing_of_placements_comes_from_stock_megatron():
    assert placement_of(Namespace(num_layers=2)) == PRE


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_a_placements_flags_ask_for_it(placement, embedding):
    placement = placement.with_options(embedding=embedding)
    assert placement_of(parse(*(word for flag in placement_flags(placement) for word in flag))) == placement


@pytest.mark.parametrize(
    "placement",
    [
        POST,
        OUTPUT.with_options(embedding=False),
        PERI.with_options(output_norm_init="depth-scaled", freeze_output_norm=True, output_norm_epsilon=1e-3),
        PERI.changed({"residual_scale": [0.5, 1.0], "output_scale": "1 / l"}),
        PLACEMENTS["mix-ln"],
    ],
    ids=lambda placement: placement.name,
)
def test_arguments_that_are_set_to_a_placement_ask_for_it(placement):
    args = Namespace()
    set_placement(args, placement)
    assert placement_of(args) == placement
    assert vars(args).keys() < vars(parse()).keys()


def test_flags_and_a_file_change_the_rule(tmp_path):
    args = parse("--residual-scale", "0.5", "--output-scale", "1 / sqrt(k)")
    assert placement_of(args) == PERI.changed({"residual_scale": 0.5, "output_scale": "1 / sqrt(k)"})
    file = tmp_path / "rule.yaml"
    file.write_text("input: [1, 0]\noutput_scale: 2\n")
    args = parse("--norm-rule", str(file), "--residual-scale", "0.5")
    read_norm_rule(args)
    file.unlink()
    changed = PERI.changed({"input": [1, 0], "output_scale": 2, "residual_scale": 0.5})
    assert placement_of(args) == changed
    words = [word for flag in placement_flags(changed) for word in flag]
    assert placement_of(parse(*words)) == changed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("a: [", "cannot be read: while parsing a flow node"),
        ("input: 2001-13-45", "cannot be read: month must be in 1..12"),
        ("0.5", "has no names with values, such as residual_scale: 0.5"),
    ],
)
def test_a_file_that_is_no_rule(text, message, tmp_path):
    file = tmp_path / "rule.yaml"
    if text is not None:
        file.write_text(text)
    args = parse("--norm-rule", str(file))
    with pytest.raises(UsageError, match=message):
        read_norm_rule(args)
    assert placement_of(args) == PERI  # other checks go on


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--residual-scale", "1 +"), "'1 \\+' is no number and no formula"),
        (("--residual-scale", "2", "--norm-rule", '{"residual_scale": 1}'), "both give it; give it once"),
        (("--norm-rule", "{"), "is no JSON"),
        (("--norm-rule", '{"colour": 1}'), "a norm rule has no colour"),
        (("--norm-rule", '{"input": [1, null]}'), "input \\[1, None\\] is no list of numbers"),
    ],
)
def test_rules_that_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        placement_of(parse(*words))


MODEL = {"num_layers": 4, "hybrid_layer_pattern": None, "mtp_num_layers": None, "qk_layernorm": False}
UNFIT = {
    "mix-ln": ({"hybrid_layer_pattern": "*-*-"}, "--hybrid-layer-pattern has the same norms in all layers"),
    "ln-scaling": ({"hybrid_layer_pattern": "*-*-"}, "--hybrid-layer-pattern has the same norms"),
    "scaled-peri": (
        {"mtp_num_layers": 1},
        "it goes by depth, and the layers of --mtp-num-layers are at none",
    ),
    "deepnorm": ({"num_experts": 8}, "its initial weights are those of attention and a dense MLP"),
    "hybrid-norm": ({}, "it norms queries and keys .*; give --qk-layernorm"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_why_a_rule_is_not_that_of_a_model(name):
    changes, message = UNFIT[name]
    reason = why_rule_does_not_fit(Namespace(**{**MODEL, **changes}), PLACEMENTS[name])
    assert re.match(f"--norm-placement {name}: {message}", reason)
    fitting = Namespace(**{**MODEL, "qk_layernorm": True})
    assert why_rule_does_not_fit(fitting, PLACEMENTS[name]) is None


def test_a_hybrid_pattern_may_have_its_former_name():
    args = Namespace(**MODEL, hybrid_override_pattern="M-M-")
    reason = why_rule_does_not_fit(args, PLACEMENTS["ln-scaling"])
    assert "--hybrid-layer-pattern has the same norms" in reason


@pytest.mark.parametrize("flag", ["fp8_param_gather", "fp4_param_gather"])
def test_weights_in_low_precision_are_not_scaled(flag):
    reason = why_rule_does_not_fit(Namespace(**MODEL, **{flag: True}), PLACEMENTS["deepnorm"])
    assert "its initial weights are those of attention and a dense MLP" in reason


def test_a_rule_for_another_number_of_layers():
    placement = PERI.changed({"residual_scale": [1, 2, 3]})
    assert "a list of 3 numbers is neither one for each of 4 layers" in why_rule_does_not_fit(
        Namespace(**MODEL), placement
    )


def test_arguments_that_contradict_each_other_are_refused():
    with pytest.raises(UsageError, match="'post' has no output norm"):
        placement_of(parse("--norm-placement", "post", "--freeze-output-norm"))


APART = {
    "--norm-placement output has not both norms": {"placement": OUTPUT},
    "--input-scale is not of its kernel": {"placement": PERI.changed({"input_scale": 0.5})},
    "--hybrid-layer-pattern has no layers of attention and MLP": {"whole_layers": False},
    "--recompute-modules layernorm recomputes that norm alone": {"recomputed": ["core_attn", "layernorm"]},
    "--offload-modules mlp_norm offloads that norm alone": {"offloaded": ["mlp_norm"]},
    f"--hidden-size {LONGEST + 1} is beyond the {LONGEST} of its kernel": {"hidden_size": LONGEST + 1},
}


def why(placement=PERI, **changes):
    fits = {"whole_layers": True, "recomputed": ["core_attn"], "offloaded": (), "hidden_size": None}
    return why_norms_stay_apart(placement, **{**fits, **changes})


@pytest.mark.parametrize("reason", APART)
def test_why_two_norms_are_not_one_kernel(reason):
    assert why(**APART[reason]) == f"--fuse-pre-mlp-norm: {reason}; drop one of them"


def test_otherwise_they_are():
    assert why() is None
    assert why(hidden_size=LONGEST) is None
