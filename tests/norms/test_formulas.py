import math

import pytest

from megatron_periln.norms.formulas import Place, check, evaluate, names_a_place

MLP_OF_THIRD = Place.of_layer(3, 8, attention=False)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (0.5, 0.5),
        (True, 1.0),
        ("sqrt(k / (k + 1))", math.sqrt(6 / 7)),
        ("(2 * L) ** 0.25", 2.0),
        ("-1 / l", -1 / 3),
        ("l <= L / 4", 0.0),
        ("mlp", 1.0),
        ("attention * K", 0.0),
        (tuple(range(8)), 2.0),  # one a layer
        (tuple(range(16)), 5.0),  # one a sublayer
    ],
    ids=str,
)
def test_what_a_value_is_at_a_place(value, number):
    check(value)
    assert evaluate(value, MLP_OF_THIRD) == pytest.approx(number)


def test_sublayers_of_a_hybrid_model_are_its_layers():
    assert Place.of_layer(5, 9, attention=True, hybrid=True) == Place(5, 9, True)
    assert [Place.of_layer(2, 4, kind).sublayer for kind in (True, False)] == [3, 4]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1 / 0", "'1 / 0' has no value at sublayer 3: float division by zero"),
        ("sqrt(0 - l)", "has no value at sublayer 3"),
        ("9 ** 9 ** 9", "has no value"),
        ("(k", r"'\(k' is no number and no formula"),
        ("depth", "'depth' is no part of a formula: those are numbers, l, L, k, K, attention, mlp"),
        ("__import__('os')", "is no part of a formula"),
        ("l.real", "is no part of a formula"),
        (math.nan, "nan is not finite"),
        (10**400, "0 is not finite"),
        ((), "is no list of numbers"),
        (("l",), "is no list of numbers"),
        ((1.0, None), "is no list of numbers"),
        (([1.0], 2.0), "is no list of numbers"),
        ((10**400,), "is no list of numbers"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_value(value, message):
    with pytest.raises(ValueError, match=message):
        check(value)


def test_a_list_of_another_length():
    with pytest.raises(ValueError, match="a list of 3 numbers is neither one for each of 8 layers nor of 16"):
        evaluate((1.0, 2.0, 3.0), MLP_OF_THIRD)


def test_what_goes_by_depth():
    assert [names_a_place(f) for f in ("(2 * L) ** 0.25", "K", "l > L / 4", "mlp")] == [
        False,
        False,
        True,
        True,
    ]
