"""Megatron's arguments from a list of flags."""

import sys

import pytest

from megatron_periln.errors import UsageError
from megatron_periln.megatron_arguments import megatron_arguments
from megatron_periln.training.parsing import add_arguments


def test_flags_are_parsed_without_the_command_lines():
    given = list(sys.argv)
    assert megatron_arguments(["--num-layers", "3"]).num_layers == 3
    assert megatron_arguments(["--norm-placement", "post"], add_arguments).norm_placement == "post"
    assert sys.argv == given


def test_unknown_flags_are_skipped_when_asked():
    args = megatron_arguments(["--num-layers", "3", "--no-such-flag"], ignore_unknown=True)
    assert args.num_layers == 3


def test_the_command_line_is_put_back_after_an_error():
    given = list(sys.argv)
    with pytest.raises(UsageError, match="--no-such-flag"):
        megatron_arguments(["--no-such-flag"], add_arguments)
    assert sys.argv == given
