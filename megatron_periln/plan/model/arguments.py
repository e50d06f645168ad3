"""A run's flags, parsed and validated as on its GPUs, at its number of ranks."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import sys
import types
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from packaging.version import Version

from megatron_periln import cpu
from megatron_periln.cpu.flags import adapt_arguments, without_low_precision
from megatron_periln.data.tokenizers.megatron_tokenizer import explained_tokenizer
from megatron_periln.errors import UsageError
from megatron_periln.flag_files import device_of
from megatron_periln.patches import fixes
from megatron_periln.plan.model.engine import ENGINE
from megatron_periln.rules import Check, Rule
from megatron_periln.training.parsing import check, parse_words
from megatron_periln.training.refusals import refusals_in_one_line

__all__ = ["buildable", "run_arguments"]

_GPU = (9, 0)  # the compute capability that flags such as --fp8-format are validated against
_STATE_DTYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
_UNKNOWN = {"M": "Mamba", "G": "gated delta net", "D": "sparse attention"}


def _layers_of_kernels(args: Namespace) -> Iterator[str]:
    pattern = args.hybrid_layer_pattern or args.hybrid_override_pattern or ""
    if args.device != "cpu" and (found := [symbol for symbol in _UNKNOWN if symbol in pattern]):
        args.hybrid_layer_pattern = args.hybrid_override_pattern = None
        args.num_layers = args.num_layers or len(pattern)
        yield (
            f"--hybrid-layer-pattern {pattern!r}: a plan does not know what the kernels of "
            f"{', '.join(_UNKNOWN[symbol] for symbol in found)} layers ({', '.join(found)}) keep in memory; "
            "plan the pattern with other layers"
        )


UNPLANNED: tuple[Check, ...] = (
    _layers_of_kernels,
    Rule(
        lambda args: args.use_megatron_fsdp or args.use_torch_fsdp2,
        "--use-megatron-fsdp, --use-torch-fsdp2: a plan does not know what FSDP shards and gathers; plan "
        "with --use-distributed-optimizer, which needs more memory",
        {"use_megatron_fsdp": False, "use_torch_fsdp2": False},
    ),
)
"""What can be trained and not planned."""

# Which only a run that starts reads.
_CHECKPOINTS = {"load": None, "pretrained_checkpoint": None, "non_persistent_ckpt_type": None}


class _FusedAdam:
    """Transformer Engine's, of which Megatron's validation asks which arguments it takes."""

    def __init__(
        self, master_weight_dtype: Any, exp_avg_dtype: Any, exp_avg_sq_dtype: Any, use_decoupled_grad: Any
    ) -> None: ...


def _engine_modules() -> dict[str, types.ModuleType]:
    """Return what stands for Transformer Engine's modules while flags that need it are validated."""
    names = ["transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"]
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[-1]].FusedAdam = _FusedAdam  # type: ignore[attr-defined]
    return modules


@contextlib.contextmanager
def _as_its_first_rank(flags: Sequence[str], world_size: int) -> Iterator[None]:
    environment = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1"),
    }
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", ["pretrain", *flags]),
        mock.patch.dict(sys.modules, _engine_modules()),
        mock.patch("torch.cuda.get_device_capability", lambda *_: _GPU),
        mock.patch("megatron.core.utils._te_version", Version(ENGINE)),
        mock.patch(f"{rope_utils.__name__}.fused_apply_rotary_pos_emb", rope_utils.apply_rotary_pos_emb),
    ):
        yield


def run_arguments(flags: Sequence[str], world_size: int) -> Namespace:
    """Return a run's arguments, validated by Megatron as those of its first rank, with ``padded_vocab_size``.

    A checkpoint to load is read only if it says what the model is (``--use-checkpoint-args``).

    Parameters
    ----------
    flags
        Those of the pretraining.
    world_size
        The number of its GPUs; of its processes with ``--device cpu``.

    Raises
    ------
    UsageError
        For flags that are wrong, or that don't fit each other or that number.
    """
    if world_size < 1:
        raise UsageError(f"--world-size must be positive, not {world_size}")
    fixes.apply()
    where = contextlib.nullcontext() if device_of(flags) == "cpu" else cpu.judging_for_gpus()
    with _as_its_first_rank(flags, world_size), where, contextlib.redirect_stdout(io.StringIO()):
        args, parser, problems = parse_words()
        if not args.use_checkpoint_args:
            vars(args).update(_CHECKPOINTS)
        problems.find(args, UNPLANNED)
        check(args, parser, problems, here=False)
        with refusals_in_one_line(), explained_tokenizer(args):
            build_tokenizer(args)
    return args


def buildable(args: Namespace) -> Namespace:
    """Return a copy of a run's arguments with which its model can be built without a GPU, of the same shapes.

    `engine` then stands for what that leaves out. Parameters are gathered before the microbatch here.
    """
    adapted = copy.deepcopy(args)
    adapted.perform_initialization = adapted.overlap_param_gather = False
    if args.device == "cpu":
        return adapted
    without_low_precision(adapted)
    adapt_arguments(adapted)
    # As validation leaves them, where a command line has words.
    vars(adapted).update(dict.fromkeys(_STATE_DTYPES, torch.float32))
    adapted.gradient_accumulation_fusion = args.gradient_accumulation_fusion
    return adapted
