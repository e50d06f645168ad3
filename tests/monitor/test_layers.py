import pytest

from megatron_periln.errors import UsageError
from megatron_periln.monitor.layers import chosen_layers


@pytest.mark.parametrize(
    ("choice", "layers"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("every:1", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("every:2", [0, 2, 4, 6, 7]),
        ("every:4", [0, 4, 7]),
        ("every:100", [0, 7]),
        ("3", [3]),
        ("7,0,3,3", [0, 3, 7]),
    ],
)
def test_choices(choice, layers):
    assert chosen_layers(choice, 6) == layers


@pytest.mark.parametrize("choice", ["", "some", "every:0", "every:-2", "every:", "1-3", "1,,2", "-1", "1, 2"])
def test_other_texts_are_refused(choice):
    with pytest.raises(UsageError, match="none of all, every:K, and a list of numbers"):
        chosen_layers(choice, 6)


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(UsageError, match=r"no layer 8; they are 0 \(the embedding\) to 7 \(the final norm\)"):
        chosen_layers("1,8", 6)
