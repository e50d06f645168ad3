import dataclasses
import math

import pytest

from megatron_periln.norms import OUTPUT, PERI, PLACEMENTS, POST, PRE, NormPlacement

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
    assert list(PLACEMENTS) == ["pre", "post", "peri", "output"]
    assert all(NormPlacement.named(name) is placement for name, placement in PLACEMENTS.items())
    assert all(placement.name == name for name, placement in PLACEMENTS.items())


@pytest.mark.parametrize("name", ["sandwich", "PERI", "", None])
def test_an_unknown_name_lists_the_choices(name):
    with pytest.raises(ValueError, match=r"choose from pre, post, peri, output$") as error:
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
    ],
)
def test_a_contradiction_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        NormPlacement(name="mine", **{**PLAIN, **changes})


@pytest.mark.parametrize("placement", [PRE, POST], ids=lambda placement: placement.name)
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
    assert len(structures) == 8
    assert PERI.structure() == "peri (with embedding norm)"
    assert PERI.with_options(freeze_output_norm=True).structure() == PERI.structure()
