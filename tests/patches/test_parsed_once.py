"""Megatron's command line is parsed once, and whoever asks for a flag sees what was given."""

from types import SimpleNamespace

import pytest
from megatron.training import arguments, ft_integration, inprocess_restart

from megatron_periln.patches.starting.parsed_once import parse_once


@pytest.fixture
def parsings(monkeypatch):
    """The flags that are parsed, none of them given."""
    for module in (ft_integration, inprocess_restart):
        monkeypatch.setattr(module, "arguments", arguments)
    monkeypatch.setattr("sys.argv", ["pretrain"])
    parse, found = arguments.parse_args, []
    monkeypatch.setattr(arguments, "parse_args", lambda **how: found.append(how) or parse(**how))
    return found


def pretrain():
    pass


def ask():
    ft_integration.setup()
    return inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)


def test_upstream_still_parses_the_command_line_for_one_flag(parsings):
    assert ask() == (pretrain, None)
    assert len(parsings) == 2


def test_the_command_line_is_parsed_once(parsings):
    parse_once(SimpleNamespace(enable_ft_package=False, inprocess_restart=False))
    assert ask() == (pretrain, None)
    assert parsings == []


def test_a_flag_that_was_given_is_seen(parsings, monkeypatch):
    asked = []
    monkeypatch.setattr(inprocess_restart, "inprocess_restart", lambda *call: asked.append(call))
    monkeypatch.setattr(inprocess_restart.torch.distributed, "TCPStore", lambda **_: "store")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    args = SimpleNamespace(enable_ft_package=True, inprocess_restart=True)
    parse_once(args)
    assert inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain) == (None, "store")
    assert asked == [(pretrain, args)]
    with pytest.raises(ModuleNotFoundError, match="nvidia_resiliency_ext"):
        ft_integration.setup()
