"""Pretraining, from parsed command line to the end of Megatron's training loop."""

from __future__ import annotations

import functools
import re
import signal
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.enums import ModelType
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.training import get_args, inprocess_restart, pretrain, set_startup_timestamps
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from torch.distributed.checkpoint.api import CheckpointException

from megatron_periln.checkpoints import guard, local
from megatron_periln.checkpoints.rendezvous import Rendezvous
from megatron_periln.collector import paused
from megatron_periln.errors import UsageError
from megatron_periln.files import allow_open_files
from megatron_periln.models import GPTModelConfig, HybridModelConfig
from megatron_periln.models.from_arguments import (
    gpt_config_from_args,
    hybrid_config_from_args,
    transformer_config,
)
from megatron_periln.norms.arguments import placement_of
from megatron_periln.patches import checkpoint_choice, fixes, training_loop
from megatron_periln.patches.starting.parsed_once import parse_once
from megatron_periln.training.checks import make_save_folder
from megatron_periln.training.cudnn_check import cudnn_in_one_line, refuse_old_cudnn
from megatron_periln.training.datasets.gpt_datasets import check_data, train_valid_test_datasets
from megatron_periln.training.divergence import Divergence
from megatron_periln.training.evaluation_checks import why_no_validation
from megatron_periln.training.forward_step import forward_step
from megatron_periln.training.parsing import parse
from megatron_periln.training.placement_checkpoint import refuse_other_local_placement
from megatron_periln.training.refusals import refusals_in_one_line

__all__ = ["embedding_ranks", "model_config_of", "run"]

# How gloo and NCCL, and the store of the ranks, tell that another rank is gone.
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Connection reset|Broken pipe|Socket closed|remote process exited"
)


def embedding_ranks(pipeline_ranks: list[int]) -> list[int]:
    """Return the ranks of a pipeline that hold the word embeddings; Megatron's ``get_embedding_ranks``.

    The first stage, the last one with tied embeddings, and those of multi-token prediction.
    """
    args = get_args()
    ranks = {pipeline_ranks[0]}
    if len(pipeline_ranks) > 1:
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pipeline_ranks[-1])
        if args.mtp_num_layers is not None:
            ranks.update(get_mtp_ranks(pipeline_ranks, transformer_config(args)))
    return sorted(ranks)


def model_config_of(args: Namespace) -> GPTModelConfig | HybridModelConfig:
    """Return the configuration of the model that validated ``args`` describe."""
    config: GPTModelConfig | HybridModelConfig
    if args.hybrid_layer_pattern is None:
        config = gpt_config_from_args(args, GPTModelConfig)
        config.fuse_pre_mlp_norm = args.fuse_pre_mlp_norm
    else:
        config = hybrid_config_from_args(args, HybridModelConfig)
    config.norm_placement = placement_of(args)
    return config


def run(program_start: float) -> None:
    """Pretrain as ``sys.argv`` says.

    Parameters
    ----------
    program_start
        When the program started, in seconds since the epoch, for Megatron's startup report.

    Raises
    ------
    UsageError
        For input that the user can correct.
    """
    allow_open_files()  # process groups and datasets want more than a shell's limit
    fixes.apply()
    set_startup_timestamps(program_start=program_start, main_entry=time.time())
    with paused():
        args = parse()
    refuse_old_cudnn(args)
    with refusals_in_one_line(args):
        configuration = pretrain_cfg_container_from_args(args, model_config_of(args))
    parse_once(args)
    wrapped_pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    if args.rank == 0:
        check_data(args)
        make_save_folder(args)
    if why_no_validation(args):
        training_loop.skip_validation()
    if args.full_validation:
        training_loop.keep_batches_of_validation_and_test_apart()
        training_loop.validate_on_each_sample_once()
    guard.install(args)
    checkpoint_choice.pass_over_unasked_state(optimizer=bool(args.no_load_optim or args.finetune))
    local.install(args, functools.partial(refuse_other_local_placement, args, placement_of(args)))
    if args.monitor_layers:
        # Not at the top: a run that is not monitored has nothing of the monitor in it.
        from megatron_periln.monitor.install import install

        install(args)
    try:
        with (
            cudnn_in_one_line(args),
            refusals_in_one_line(args),
            _explained_schedule(),
            Divergence(args).in_one_line(),
            _silent_where_another_rank_speaks(args),
        ):
            wrapped_pretrain(
                configuration,
                train_valid_test_datasets,
                ModelType.encoder_or_decoder,
                forward_step,
                store=store,
                get_embedding_ranks=embedding_ranks,
            )
    except CheckpointException as error:
        raise guard.failure(args, error) from error
    finally:
        if args.exit_signal_handler:
            # Python would restore the default while it ends, and a late signal make a saved run fail.
            signal.signal(args.exit_signal, signal.SIG_IGN)


@contextmanager
def _silent_where_another_rank_speaks(args: Namespace) -> Iterator[None]:
    """End with status 1 where the connection to a rank is lost that has told of its error."""
    try:
        yield
    except RuntimeError as error:
        if _LOST.search(str(error)) and Rendezvous(args).another_has_spoken():
            raise SystemExit(1) from error
        raise


@contextmanager
def _explained_schedule() -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        if not str(error).startswith("OptimizerParamScheduler"):
            raise
        raise UsageError(
            f"the checkpoint was trained with another schedule ({error}); "
            "give --override-opt-param-scheduler to follow the flags, "
            "or --use-checkpoint-opt-param-scheduler to follow the checkpoint"
        ) from error
