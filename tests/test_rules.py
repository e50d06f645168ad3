"""What is wrong with a command line is found by rules, and said together."""

from argparse import Namespace

import pytest

from megatron_periln.errors import UsageError
from megatron_periln.rules import Problems, Rule, refuse

EVEN = Rule(lambda args: args.size % 2, "--size {size} is odd; give an even one", {"size": 0})
SMALL = Rule(lambda args: args.size > 9, "--size {size} is too much")


def names(args):
    if args.name:
        yield f"--name {args.name} is taken"


def test_one_thing_is_one_line_and_several_are_a_list():
    with pytest.raises(UsageError) as refusal:
        refuse(Namespace(size=10, name=""), (EVEN, SMALL, names))
    assert str(refusal.value) == "--size 10 is too much"
    with pytest.raises(UsageError) as refusal:
        refuse(Namespace(size=10, name="x"), (EVEN, SMALL, names))
    assert str(refusal.value).splitlines() == [
        "2 things are wrong with these flags:",
        "  --size 10 is too much",
        "  --name x is taken",
    ]


def test_what_a_rule_corrects_is_corrected_for_the_next():
    args = Namespace(size=11, name="")
    with pytest.raises(UsageError, match=r"^--size 11 is odd; give an even one$"):
        refuse(args, (EVEN, SMALL))
    assert args.size == 0


def test_nothing_is_refused_where_nothing_is_wrong():
    args = Namespace(size=2, name="")
    refuse(args, (EVEN, SMALL, names))
    assert args == Namespace(size=2, name="")


def test_what_is_raised_is_caught_and_said_once():
    problems = Problems()
    for final in (False, True):
        with problems.caught(final=final):
            raise UsageError("wrong")
    assert (problems.texts, problems.final) == (["wrong"], True)
    with pytest.raises(ZeroDivisionError), problems.caught():
        raise ZeroDivisionError
