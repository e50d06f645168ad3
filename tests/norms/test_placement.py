import dataclasses
import math

import pytest

from megatron_periln.norms import OUTPUT, PERI, PLACEMENTS, POST, PRE, NormPlacement, SublayerRule
from megatron_periln.norms.formulas import Place

PLAIN = {"input": True, "output": True, "after_add": False, "final": True, "embedding": False}


@pytest.mark.parametrize(
    ("placement", "input", "output", "after_add", "final", "embedding"),
    [
        (PRE, True, False, False, True, False),
        (POST, False, False, True, False, False),
        (PERI, True, True, False, True, True),
        (OUTPUT, False, True, False, True, True),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_four_placements(placement, input, output, after_add, final, embedding):
    found = (placement.input, placement.output, placement.after_add, placement.final, placement.embedding)
    assert found == (input, output, after_add, final, embedding)
    assert (placement.output_norm_init, placement.freeze_output_norm) == ("ones", False)
    assert placement.output_norm_epsilon is None


def test_placements_are_found_by_name():
    assert list(PLACEMENTS)[:4] == ["pre", "post", "peri", "output"]
    assert all(NormPlacement.named(name) is placement for name, placement in PLACEMENTS.items())
    assert all(placement.name == name for name, placement in PLACEMENTS.items())


@pytest.mark.parametrize("name", ["sandwich", "PERI", "", None])
def test_an_unknown_name_lists_the_choices(name):
    with pytest.raises(ValueError, match=r"choose from pre, post, peri, output, deepnorm, ") as error:
        NormPlacement.named(name)
    assert repr(name) in str(error.value)


def test_a_placement_cannot_be_changed_and_can_be_a_key():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PERI.output = False
    assert {PERI: 1}[dataclasses.replace(PERI)] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"after_add": True}, "'mine': a sublayer has one norm after it"),
        ({"output_norm_init": "zeros"}, "'ones' or 'depth-scaled', not 'zeros'"),
        ({"output_norm_epsilon": 0.0}, "output_norm_epsilon must be positive, not 0.0"),
        ({"output_norm_epsilon": -1e-5}, "output_norm_epsilon must be positive, not -1e-05"),
        ({"output_norm_epsilon": math.nan}, "output_norm_epsilon must be positive, not nan"),
        ({"output": False, "output_norm_init": "depth-scaled"}, "'mine' has no output norm"),
        ({"output": False, "freeze_output_norm": True}, "'mine' has no output norm"),
        ({"output": False, "output_norm_epsilon": 1e-6}, "'mine' has no output norm"),
        ({"input": False, "input_scale": 0.5}, "'mine' has no input norm to scale"),
        ({"initial_scale": "1 / l"}, "initial_scale is of all layers, .* not 1 / l"),
        ({"initial_scale": (0.5, 1.0)}, r"initial_scale is of all layers, .* not \[0.5, 1.0\]"),
    ],
)
def test_a_contradiction_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        NormPlacement(name="mine", **{**PLAIN, **changes})


@pytest.mark.parametrize("placement", [PRE, POST, PLACEMENTS["keel"]], ids=lambda placement: placement.name)
@pytest.mark.parametrize(
    "option",
    [{"output_norm_init": "depth-scaled"}, {"freeze_output_norm": True}, {"output_norm_epsilon": 1e-6}],
    ids=lambda option: next(iter(option)),
)
def test_output_norm_options_need_an_output_norm(placement, option):
    with pytest.raises(ValueError, match=f"{placement.name!r} has no output norm .* choose peri or output"):
        placement.with_options(**option)


def test_options_change_what_they_name_and_nothing_else():
    options = {"output_norm_init": "depth-scaled", "freeze_output_norm": True, "output_norm_epsilon": 1e-6}
    changed = PERI.with_options(embedding=False, **options)
    assert changed == dataclasses.replace(PERI, embedding=False, **options)
    assert PLACEMENTS["peri"] == PERI and PERI.embedding


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_without_options_a_placement_stays_as_it_is(placement):
    assert placement.with_options() == placement
    assert placement.with_options(embedding=not placement.embedding).embedding != placement.embedding


def test_initial_output_weights():
    assert PERI.initial_output_weight(16) == 1.0
    assert PERI.with_options(output_norm_init="depth-scaled").initial_output_weight(16) == 0.25


@pytest.mark.parametrize(
    ("placement", "norms"), [(PRE, 2 * 3 + 1), (POST, 2 * 3), (PERI, 4 * 3 + 2), (OUTPUT, 2 * 3 + 2)]
)
def test_parameters_of_three_layers(placement, norms):
    assert placement.num_parameters(3, 10) == 10 * norms
    assert placement.num_parameters(3, 10, "LayerNorm") == 20 * norms


def test_peri_adds_two_norms_a_layer_and_the_embedding_norm():
    layers, hidden = 24, 1024
    without = PERI.with_options(embedding=False).num_parameters(layers, hidden)
    assert without - PRE.num_parameters(layers, hidden) == 2 * layers * hidden
    assert PERI.num_parameters(layers, hidden) - without == hidden


def test_the_structure_tells_apart_what_holds_other_parameters():
    structures = {p.with_options(embedding=e).structure() for p in PLACEMENTS.values() for e in (False, True)}
    assert len(structures) == 2 * len(PLACEMENTS)
    assert PERI.structure() == "peri (with embedding norm)"
    assert PERI.with_options(freeze_output_norm=True).structure() == PERI.structure()


def rule(norms, a=1.0, b=1.0, s=1.0, learned=""):
    """``norms`` are letters: i on the input, o on the output, a after the add."""
    return SublayerRule("i" in norms, "o" in norms, "a" in norms, s, a, b, learned)


# Of 8 layers, by name: what the papers' formulas give for layers 1, 2 and 3, attention then MLP.
L = 8
NAMED = {
    "pre": [rule("i")] * 6,
    "post": [rule("a")] * 6,
    "peri": [rule("io")] * 6,
    "output": [rule("o")] * 6,
    "deepnorm": [rule("a", a=2.0)] * 6,  # 16 ** 0.25
    "keel": [rule("ia", a=16.0)] * 6,
    "ln-scaling": [rule("i", s=layer**-0.5) for layer in (1, 1, 2, 2, 3, 3)],
    "mix-ln": [rule("a")] * 4 + [rule("i")] * 2,
    "hybrid-norm": [rule("a"), rule("")] * 3,
    "scaled-peri": [rule("io", a=math.sqrt(k / (k + 1)), b=math.sqrt(1 / (k + 1))) for k in range(1, 7)],
    "gated-peri": [rule("io", learned="gates")] * 6,
    "gpas": [rule("i", learned="gpas")] * 6,
}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_rules_of_sublayers(name):
    found, expected = PLACEMENTS[name].rules(L), NAMED[name]
    assert len(found) == 2 * L
    for mine, theirs in zip(found[:6], expected, strict=True):
        assert dataclasses.astuple(mine) == pytest.approx(dataclasses.astuple(theirs))


def test_what_differs_by_depth():
    placements = PLACEMENTS.values()
    assert [p.name for p in placements if not p.same_norms] == ["mix-ln", "hybrid-norm"]
    by_depth = [p.name for p in placements if p.goes_by_depth]
    assert by_depth == ["ln-scaling", "mix-ln", "hybrid-norm", "scaled-peri"]
    assert [p.name for p in placements if p.adds_plainly] == ["pre", "ln-scaling"]


@pytest.mark.parametrize("layers", [2, 12, 96])
def test_deepnorm_keeps_its_theorem(layers):
    """Wang et al., section 4.2: with v = w = beta, 2N (v^2 + w^2) / alpha^2 is of order 1; here it is 1."""
    deepnorm = PLACEMENTS["deepnorm"]
    alpha = deepnorm.rules(layers)[0].residual_scale
    beta = float(f"{(8 * layers) ** -0.25}")
    assert deepnorm.initial_scale == "(8 * L) ** -0.25"
    assert 2 * layers * 2 * beta**2 / alpha**2 == pytest.approx(1)


def test_a_changed_rule_has_another_label_and_its_changes_make_it_again():
    changed = PERI.changed({"residual_scale": [0.5, 1.0], "output": "l > 1"})
    assert changed.label == "peri, output l > 1, residual scale [0.5, 1.0]"
    assert PERI.changed(changed.changes()) == changed
    assert PERI.label == "peri" and PERI.changes() == {}
    assert changed.structure() != PERI.structure()
    assert [r.output for r in changed.rules(2)] == [False, False, True, True]
    with pytest.raises(ValueError, match="a list of 2 numbers is neither one for each of 3 layers"):
        changed.rules(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gain": 2},
            "a norm rule has no gain; it has input, output, after_add, input_scale, residual_scale",
        ),
        ({"final": "yes"}, "a norm rule's final can't be 'yes'"),
        ({"output": {}}, "a norm rule's output can't be {}"),
        ({"learned": "gate"}, "learned is '', 'scales', 'gates' or 'gpas', not 'gate'"),
        (
            {"learned": "gates", "output_scale": 0.5},
            "gates give residual_scale and output_scale; leave",
        ),
        ({"residual_scale": "depth"}, "'peri': residual_scale 'depth' is no part of a formula"),
        ({"after_add": True}, "'peri': a sublayer has one norm after it"),
    ],
)
def test_a_change_that_is_none(changes, message):
    with pytest.raises(ValueError, match=message):
        PERI.changed(changes)


def test_two_norms_after_one_sublayer_are_found_where_they_are():
    both = PERI.changed({"after_add": "l == 2"})
    with pytest.raises(ValueError, match="sublayer 3 has two norms after it"):
        both.rules(2)
    assert both.at(Place(1, 4, True)).output


def test_parameters_of_rules_by_depth():
    assert PLACEMENTS["mix-ln"].num_parameters(8, 10) == PRE.num_parameters(8, 10)
    assert PLACEMENTS["hybrid-norm"].num_parameters(8, 10) == 10 * (8 + 1)
    assert PLACEMENTS["keel"].num_parameters(8, 10) == 10 * 2 * 16
    assert PLACEMENTS["gated-peri"].num_parameters(8, 10) == PERI.num_parameters(8, 10) + 10 * 16
    assert PLACEMENTS["gpas"].num_parameters(8, 10) == PRE.num_parameters(8, 10) + 16
