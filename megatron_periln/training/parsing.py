"""The command line: parses Megatron's flags and ours, and checks them against the checkpoint to load."""

from __future__ import annotations

import argparse
import sys
from argparse import ArgumentParser, Namespace
from typing import NoReturn

from megatron.core.rerun_state_machine import RerunMode
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import set_global_variables

from megatron_periln import cpu
from megatron_periln.checkpoints.guard import put_back
from megatron_periln.checkpoints.intact import FLAG_GROUP as CHECKPOINTS
from megatron_periln.checkpoints.intact import add_checkpoint_arguments, choose_intact_checkpoint
from megatron_periln.checkpoints.saved_arguments import checkpoint_path, saved_arguments
from megatron_periln.checkpoints.sources import loads_from
from megatron_periln.cpu.flags import adapt_arguments
from megatron_periln.data.tokenizers.megatron_tokenizer import check_tokenizer_files, explained_tokenizer
from megatron_periln.errors import UsageError
from megatron_periln.monitor.settings import GROUP as MONITOR
from megatron_periln.monitor.settings import add_monitor_arguments, check_monitor
from megatron_periln.norms.arguments import GROUP as NORMS
from megatron_periln.norms.arguments import add_norm_arguments, placement_of
from megatron_periln.training.batch_sizes import check_batch_sizes, translate_rampup
from megatron_periln.training.checks import check_flags, check_model
from megatron_periln.training.dropped_flags import make_flags_act, refuse_dropped_flags
from megatron_periln.training.evaluation_checks import check_evaluation
from megatron_periln.training.idle_flags import idle_flags
from megatron_periln.training.mask_checks import check_masks
from megatron_periln.training.model_settings import (
    add_model_arguments,
    adopt_model,
    given_settings,
    refuse_other_model,
)
from megatron_periln.training.norm_backend import choose_norm_backend
from megatron_periln.training.placement_checkpoint import (
    adopt_saved_placement,
    consumed_samples,
    refuse_other_placement,
)
from megatron_periln.training.refusals import refusals_in_one_line

__all__ = ["add_arguments", "check", "parse"]

USAGE = (
    "torchrun --nproc-per-node N -m megatron_periln.pretrain --norm-placement PLACEMENT [Megatron's flags]"
)


class _HelpAll(argparse.Action):
    def __call__(self, parser: ArgumentParser, *_: object) -> NoReturn:
        for action in parser._actions:
            try:
                parser._get_formatter()._expand_help(action)
            except (TypeError, ValueError):  # a bare percent sign in one of Megatron's help texts
                action.help = (action.help or "").replace("%", "%%")
        print(ArgumentParser.format_help(parser))
        parser.exit()


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add our groups of flags to Megatron's parser, and a help that fits a screen."""
    add_norm_arguments(parser)
    add_monitor_arguments(parser)
    add_checkpoint_arguments(parser)
    add_model_arguments(parser)
    group = parser.add_argument_group(title="device")
    group.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu runs Megatron on the CPU over gloo, on machines without a GPU; default: cuda",
    )
    group.add_argument("--help-all", action=_HelpAll, nargs=0, help="show Megatron's flags too, and exit")
    parser.usage = USAGE
    parser.description = "Pretrain a GPT with Megatron and a norm placement."
    parser.format_help = lambda: _short_help(parser)  # type: ignore[method-assign]
    parser.error = _raise_usage_error  # type: ignore[method-assign]
    return parser


def _raise_usage_error(message: str) -> NoReturn:
    raise UsageError(f"{message}; --help lists the flags")


def _short_help(parser: ArgumentParser) -> str:
    own = (NORMS, MONITOR, CHECKPOINTS, "device")
    groups = [group for group in parser._action_groups if group._group_actions and group.title is not None]
    formatter = parser._get_formatter()
    formatter.add_usage(parser.usage, [], [])
    formatter.add_text(parser.description)
    for group in groups:
        if group.title in own:
            formatter.start_section(group.title)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
    titles = sorted(
        {f"{group.title} ({len(group._group_actions)})" for group in groups if group.title not in own}
    )
    formatter.add_text(
        "All other flags are Megatron's, with its names and defaults; --help-all shows them. By group, "
        f"with their number: {', '.join(titles)}."
    )
    return formatter.format_help()


def parse() -> Namespace:
    """Parse ``sys.argv``, validate it as Megatron does, and make it Megatron's global arguments.

    Returns
    -------
    Namespace
        Megatron's arguments and those of `add_arguments`; ``embedding_norm`` is True or False.

    Raises
    ------
    UsageError
        For flags that are wrong, contradict each other, or contradict the checkpoint to load.
    """
    if any(argument.startswith("--yaml-cfg") for argument in sys.argv):  # parse_args would read it
        raise UsageError("--yaml-cfg has no norm placement; give flags, or a file of them as @FILE")
    parsers: list[ArgumentParser] = []

    def add_and_keep(parser: ArgumentParser) -> ArgumentParser:
        parsers.append(add_arguments(parser))
        return parser

    with refusals_in_one_line():
        args = parse_args(add_and_keep)
    check(args, parsers[0])
    with refusals_in_one_line(args), explained_tokenizer(args):
        set_global_variables(args)
    return args


def check(args: Namespace, parser: ArgumentParser) -> None:
    """Check parsed arguments against each other and against the checkpoint to load, and complete them.

    Parameters
    ----------
    args
        As parsed; changed in place.
    parser
        Which has parsed them.

    Raises
    ------
    UsageError
        As `parse` does.
    """
    check_flags(args)
    refuse_dropped_flags(args)
    idle = idle_flags(args, parser)
    put_back(args)
    choose_intact_checkpoint(args)
    if args.use_checkpoint_args:
        if args.load is None and args.pretrained_checkpoint is None:
            raise UsageError(
                "--use-checkpoint-args needs a checkpoint: give --load or --pretrained-checkpoint"
            )
        if args.non_persistent_ckpt_type == "local":
            raise UsageError(
                "--use-checkpoint-args can't read local checkpoints (--non-persistent-ckpt-type local); give "
                "the model's flags instead"
            )
        given = given_settings(args, parser)
        load_args_from_checkpoint(args, load_arg=loads_from(args))
        adopt_saved_placement(args)
        if (saved := saved_arguments(args, loads_from(args))) is not None:
            adopt_model(args, saved, given)
    args.tokenizer_type = args.tokenizer_type or "GPT2BPETokenizer"  # as Megatron's pretrain_gpt.py
    check_tokenizer_files(args)
    placement = placement_of(args)
    args.embedding_norm = placement.embedding
    refuse_other_placement(args, placement)
    _tell(args, "Flags that change nothing in this run:", idle)
    _tell(
        args, "Flags that act otherwise than in Megatron:", [*make_flags_act(args), *translate_rampup(args)]
    )
    if cpu.is_active():
        _tell(args, "--device cpu changes flags that need a GPU:", adapt_arguments(args))
    check_model(args, placement)
    check_masks(args)
    if args.rerun_mode == "report_stats":
        args.rerun_mode = RerunMode.REPORT_DETERMINISM_STATS.value  # the word that Megatron's code reads
    with refusals_in_one_line(args):
        validate_args(args)
    load_arg = loads_from(args)
    path = checkpoint_path(args, load_arg)
    refuse_other_model(args, saved_arguments(args, load_arg), str(path.parent if path else args.load))
    check_batch_sizes(args, consumed_samples(args))
    check_evaluation(args)
    check_monitor(args)
    choose_norm_backend(args)


def _tell(args: Namespace, title: str, lines: list[str]) -> None:
    if lines and args.rank == 0:
        print("\n  ".join([title, *lines]), flush=True)
