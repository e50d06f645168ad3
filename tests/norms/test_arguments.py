"""From flags and saved arguments to placements, and back."""

from argparse import ArgumentParser, Namespace

import pytest

from megatron_periln.errors import UsageError
from megatron_periln.norms import OUTPUT, PERI, PLACEMENTS, POST, PRE
from megatron_periln.norms.arguments import (
    add_norm_arguments,
    placement_flags,
    placement_of,
    set_placement,
    why_norms_stay_apart,
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
    ],
    ids=lambda placement: placement.name,
)
def test_arguments_that_are_set_to_a_placement_ask_for_it(placement):
    args = Namespace()
    set_placement(args, placement)
    assert placement_of(args) == placement
    assert vars(args).keys() < vars(parse()).keys()


def test_arguments_that_contradict_each_other_are_refused():
    with pytest.raises(UsageError, match="'post' has no output norm"):
        placement_of(parse("--norm-placement", "post", "--freeze-output-norm"))


APART = {
    "--norm-placement output has not both norms": {"placement": OUTPUT},
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
