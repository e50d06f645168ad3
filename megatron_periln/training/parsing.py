"""The command line: parses Megatron's flags and ours, and checks them against the checkpoint to load."""

from __future__ import annotations

import argparse
import functools
import sys
from argparse import ArgumentParser, Namespace
from typing import NoReturn

from megatron.core.rerun_state_machine import RerunMode
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import get_tokenizer, set_global_variables

from megatron_periln import cpu
from megatron_periln.checkpoints.guard import put_back
from megatron_periln.checkpoints.intact import FLAG_GROUP as CHECKPOINTS
from megatron_periln.checkpoints.intact import add_checkpoint_arguments, choose_intact_checkpoint
from megatron_periln.checkpoints.saved_arguments import checkpoint_path, saved_arguments
from megatron_periln.checkpoints.sources import loads_from
from megatron_periln.cpu.flags import GPU_ONLY, adapt_arguments, without_low_precision
from megatron_periln.data.tokenizers.megatron_tokenizer import check_tokenizer_files, explained_tokenizer
from megatron_periln.errors import FLAG, UsageError
from megatron_periln.monitor.settings import GROUP as MONITOR
from megatron_periln.monitor.settings import add_monitor_arguments, check_monitor
from megatron_periln.norms import NormPlacement
from megatron_periln.norms.arguments import GROUP as NORMS
from megatron_periln.norms.arguments import (
    add_norm_arguments,
    placement_of,
    read_norm_rule,
    set_placement,
)
from megatron_periln.rules import Problems
from megatron_periln.training.batch_sizes import accept_the_last_size, check_batch_sizes, translate_rampup
from megatron_periln.training.checks import AS_PARSED, MODEL, SIZES
from megatron_periln.training.datasets import data_order
from megatron_periln.training.dropped_flags import DROPPED, make_flags_act
from megatron_periln.training.evaluation_checks import EVALUATION, why_no_validation
from megatron_periln.training.flag_names.lenient import parse_leniently
from megatron_periln.training.graph_checks import GRAPHS
from megatron_periln.training.idle_flags import OTHER_MODELS, idle_flags
from megatron_periln.training.mask_checks import MASKS
from megatron_periln.training.model_settings import (
    add_model_arguments,
    adopt_model,
    given_settings,
    refuse_other_model,
)
from megatron_periln.training.norm_backend import choose_norm_backend
from megatron_periln.training.optimizers.emerging import EMERGING
from megatron_periln.training.packages import PACKAGES, save_asynchronously_without_nvrx
from megatron_periln.training.placement_checkpoint import (
    adopt_saved_placement,
    consumed_samples,
    refuse_other_placement,
)
from megatron_periln.training.refusals import refusals_in_one_line, try_validation
from megatron_periln.training.refusals.needed import NEEDED, SCHEDULE

__all__ = ["add_arguments", "check", "parse", "parse_words", "set_globals"]

USAGE = (
    "torchrun --nproc-per-node N -m megatron_periln.pretrain --norm-placement PLACEMENT [Megatron's flags]"
)


_REFUSED = "Megatron refuses these flags"


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
    data_order.add_data_order_arguments(parser)
    group = parser.add_argument_group(title="device")
    group.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu runs Megatron on the CPU, over gloo; default: cuda",
    )
    group.add_argument("--without-fp8", action="store_true", help="train in bf16 what asks for FP8 or FP4")
    group.add_argument(FLAG, action="store_true", help="show the tracebacks of an error before its one line")
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
    args, parser, problems = parse_words()
    check(args, parser, problems)
    choose_norm_backend(args)
    with refusals_in_one_line(args), explained_tokenizer(args):
        set_globals(args)
    return args


def parse_words() -> tuple[Namespace, ArgumentParser, Problems]:
    """Parse ``sys.argv``; return the arguments, the parser and what is wrong with the words.

    Raises
    ------
    UsageError
        For words after which nothing else can be judged.
    """
    if any(argument.startswith("--yaml-cfg") for argument in sys.argv):  # parse_args would read it
        raise UsageError("--yaml-cfg has no norm placement; give flags, or a file of them as @FILE")
    parsers: list[ArgumentParser] = []
    problems = Problems()

    def add_and_keep(parser: ArgumentParser) -> ArgumentParser:
        parsers.append(add_arguments(parser))
        parser.parse_args = functools.partial(parse_leniently, parser, problems)  # type: ignore[assignment]
        return parser

    with refusals_in_one_line():
        args = parse_args(add_and_keep)
    return args, parsers[0], problems


def set_globals(args: Namespace) -> None:
    """Make checked arguments Megatron's global ones, and complete them by the tokenizer's vocabulary."""
    set_global_variables(args)
    if args.padded_vocab_size is None:  # with --no-pad-vocab-size, and Megatron counts operations by it
        args.padded_vocab_size = get_tokenizer().vocab_size


def check(
    args: Namespace, parser: ArgumentParser, problems: Problems | None = None, *, here: bool = True
) -> None:
    """Check parsed arguments against each other and against the checkpoint to load, and complete them.

    Parameters
    ----------
    args
        As parsed; changed in place.
    parser
        Which has parsed them.
    problems
        What was found wrong while it did: told together with what is found here.
    here
        Whether the run is one of this machine, which must have the packages that it needs.

    Raises
    ------
    UsageError
        As `parse` does.
    """
    problems, from_local = problems or Problems(), False
    idle = idle_flags(args, parser)
    problems.find(args, SIZES, final=True)  # once more with a checkpoint's: until then, ranks would wait
    problems.find(args, (*AS_PARSED, *DROPPED))
    if problems.texts:
        problems.final |= args.use_checkpoint_args  # the model is not known
    else:
        if here:
            put_back(args)
            from_local = choose_intact_checkpoint(args)
        if args.use_checkpoint_args:
            _adopt_checkpoint(args, parser)
    if args.vocab_file or args.merge_file:
        args.tokenizer_type = args.tokenizer_type or "GPT2BPETokenizer"  # as Megatron's pretrain_gpt.py
    with problems.caught():
        check_tokenizer_files(args)
    with problems.caught():
        read_norm_rule(args)
    placement = _placement(args, problems)
    if not problems.texts:
        refuse_other_placement(args, placement)
    changes = without_low_precision(args) if args.without_fp8 else []
    changes += [*make_flags_act(args), *(save_asynchronously_without_nvrx(args) if here else ())]
    with problems.caught():
        changes += [*accept_the_last_size(args), *translate_rampup(args)]
    adapted: list[str] = []
    if cpu.is_active():
        problems.find(args, GPU_ONLY)
        adapted = adapt_arguments(args)
    problems.find(args, (*NEEDED, *SIZES), final=True)
    problems.find(args, (*SCHEDULE, *MODEL, *MASKS, *(PACKAGES if here else ()), *EMERGING))
    if not problems.texts:
        _tell(args, "Flags that change nothing in this run:", [*problems.harmless, *idle])
        _tell(args, "Flags that act otherwise than in Megatron:", changes)
        _tell(args, "--device cpu changes flags that need a GPU:", adapted)
    if args.rerun_mode == "report_stats":
        args.rerun_mode = RerunMode.REPORT_DETERMINISM_STATS.value  # the word that Megatron's code reads
    if not problems.final:
        _try(args, problems, {line.partition(" ")[0] for line in adapted}, from_local=from_local)
    others = [line.partition(" ")[0] for line in idle if OTHER_MODELS in line]
    if others and problems.texts:
        problems.add(f"{', '.join(others)}: of other models, {OTHER_MODELS}; drop them")
    problems.refuse()
    with refusals_in_one_line(args):
        validate_args(args)
    load_arg = loads_from(args)
    path = checkpoint_path(args, load_arg)
    saved = saved_arguments(args, load_arg)
    refuse_other_model(args, saved, str(path.parent if path else args.load))
    data_order.remember(saved)
    check_monitor(args)
    if reason := why_no_validation(args):
        _tell(args, "There is no evaluation while training:", [reason])


def _try(args: Namespace, problems: Problems, adapted: set[str], *, from_local: bool) -> None:
    """Find what Megatron's validation refuses, and what is wrong once it has completed the arguments.

    Parameters
    ----------
    args
        As they are to be validated.
    problems
        Gets what is found.
    adapted
        The names of arguments that ``--device cpu`` has changed.
    from_local
        Whether the run goes on from a local checkpoint.
    """
    trial = try_validation(args)
    problems.cause = problems.cause or trial.error
    for refusal in trial.refusals:
        changed = ", ".join(sorted(refusal.names & adapted))
        why = f"--device cpu can't have these flags, for it changes {changed}" if changed else _REFUSED
        problems.add(f"{why}: {refusal.text}")
    if trial.args is None:
        return
    problems.find(trial.args, (*EVALUATION, *GRAPHS))
    with problems.caught():
        if not from_local:  # else it is done once that is loaded, which says how many samples it has seen
            check_batch_sizes(trial.args, consumed_samples(trial.args))
    with problems.caught():
        check_monitor(trial.args)


def _adopt_checkpoint(args: Namespace, parser: ArgumentParser) -> None:
    given = given_settings(args, parser)
    load_args_from_checkpoint(args, load_arg=loads_from(args))
    adopt_saved_placement(args)
    if (saved := saved_arguments(args, loads_from(args))) is not None:
        adopt_model(args, saved, given)


def _placement(args: Namespace, problems: Problems) -> NormPlacement:
    """Return the placement that is asked for; without the options that contradict it, where some do."""
    try:
        placement = placement_of(args)
    except UsageError as error:
        problems.add(str(error))
        placement = NormPlacement.named(args.norm_placement)
        set_placement(args, placement)
    args.embedding_norm = placement.embedding
    return placement


def _tell(args: Namespace, title: str, lines: list[str]) -> None:
    if lines and args.rank == 0:
        print("\n  ".join([title, *lines]), flush=True)
