"""Every flag that can't be parsed is found, not the first alone."""

from argparse import ArgumentParser

import pytest

from megatron_periln.errors import UsageError
from megatron_periln.rules import Problems
from megatron_periln.training.flag_names.lenient import parse_leniently


def parse(words):
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--size", type=int, default=1)
    parser.add_argument("--kind", choices=["a", "b"], default="a")
    parser.add_argument("--layers", nargs="+", type=int)
    problems = Problems()
    return parse_leniently(parser, problems, words.split()), problems


def test_what_can_be_parsed_is_not_touched():
    args, problems = parse("--size -2 --kind=b --layers 1 2")
    assert (args.size, args.kind, args.layers) == (-2, "b", [1, 2])
    assert (problems.texts, problems.final) == ([], False)


def test_unknown_flags_are_named_each_with_its_values():
    args, problems = parse("--sise 3 4 --layers 1 2 --king=c -x --size 5")
    assert (args.size, args.layers) == (5, [1, 2])
    assert problems.texts == [
        f"unrecognized arguments: {words}--help lists the flags"
        for words in ("--sise 3 4; did you mean --size? ", "--king=c; did you mean --kind? ", "-x; ")
    ]
    assert not problems.final


def test_wrong_values_are_left_out():
    _, problems = parse("--kind c --size x")
    assert not problems.final  # there are defaults to go on with
    args, problems = parse("--kind c --size x --layers 1 y --size=z --kind b")
    assert (args.size, args.kind, args.layers) == (1, "a", None)
    assert [text.partition(":")[0] for text in problems.texts] == [
        "argument --kind",
        "argument --size",
        "argument --layers",
    ]
    assert problems.final


def test_what_belongs_to_no_flag_is_refused_at_once():
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("place", type=int)
    with pytest.raises(UsageError, match="argument place: invalid int value"):
        parse_leniently(parser, Problems(), ["x"])
