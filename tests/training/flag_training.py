"""What a flag does to training: Megatron's ``pretrain``, whole, on a model of two layers for three steps."""

import atexit
import contextlib
import dataclasses
import gc
import hashlib
import io
import json
import logging
import os
import re
import signal
import warnings
from pathlib import Path
from unittest import mock

import megatron.core.config
import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import destroy_rerun_state_machine
from megatron.core.transformer.moe import router_trace
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.training import ft_integration, global_vars, training
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from megatron_periln.training.datasets.gpt_datasets import check_data, train_valid_test_datasets
from megatron_periln.training.forward_step import forward_step
from megatron_periln.training.parsing import set_globals
from megatron_periln.training.run import embedding_ranks, model_config_of
from tests.training import flag_trials as trials

TRAINING = (
    "~--mock-data --data-path DATA --split 80,10,10 ~--train-iters --train-iters 3 --num-workers 0 "
    "--log-interval 1 --eval-interval 2 --eval-iters 1 --save-interval 2"
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What came of a run.

    Attributes
    ----------
    steps
        Of each iteration what Megatron logs: losses, learning rate, norm of the gradients, loss scale; and
        the weight decay of the groups of parameters.
    evaluations
        The losses of each.
    weights, optimizer
        Digests of what the run ends with.
    files
        What it has written, without what differs from run to run.
    said
        What it printed.
    status
        With which it ended itself, None if it did not.
    """

    steps: list
    evaluations: list
    weights: str
    optimizer: str
    files: frozenset
    said: str
    status: object

    def differs_from(self, other):
        """Return the names of what is not the same, to the last bit."""
        return {
            field.name
            for field in dataclasses.fields(self)
            if field.name != "said" and getattr(self, field.name) != getattr(other, field.name)
        }


def same_training(one, other):
    """Tell whether two runs took the same steps, but for how these are rounded."""
    mine, others = ([(step["rate"], step["lm loss"]) for step in run.steps] for run in (one, other))
    return len(mine) == len(others) and np.allclose(mine, others, rtol=2e-4)


def write_dataset(prefix, seed, documents=300):
    """Write documents of various lengths, each ending with the tokenizer's end, and so inside samples."""
    random = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(documents):
        tokens = [*random.integers(0, trials.VOCABULARY - 1, random.integers(3, 30)), trials.VOCABULARY - 1]
        builder.add_document(torch.tensor(np.array(tokens, dtype=np.int64)), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def prepare(folder):
    """Write what flags name: datasets DATA and DATA2, files that name them, and the checkpoint CHECKPOINT."""
    for number, name in enumerate(("DATA", "DATA2")):
        write_dataset(folder / name, number)
    (folder / "data.txt").write_text(f"{folder}/DATA")
    parts = {name: [f"{folder}/DATA"] for name in ("train", "valid", "test")}
    (folder / "split.json").write_text(json.dumps(parts))
    ends = "~--train-iters --train-iters 5 --exit-interval 3 --save CHECKPOINT --hidden-dropout 0.1 "
    train(f"{trials.MODELS['dense']} {ends}--norm-epsilon 0.01", folder)


def parse(flags, folder):
    """Parse and check ``flags`` as `train` does; return the arguments, and what was printed."""
    flags = f"{TRAINING} --data-cache-path FOLDER/cache {flags}"
    flags = re.sub(r"\b(DATA2?|CHECKPOINT)\b", r"FOLDER/\1", flags).replace("FOLDER", str(folder))
    return trials.parse(flags)


def train(flags, folder):
    """Train by ``flags``, beside those of `TRAINING`, where DATA and the like are in ``folder``."""
    args, first = parse(flags, folder)
    before = set(Path(folder).rglob("*"))
    watch = _Watch()
    said = io.StringIO()
    status = None
    with _alone(), watch.installed(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        check_data(args)
        set_globals(args)
        config = pretrain_cfg_container_from_args(args, model_config_of(args))
        try:
            training.pretrain(
                config,
                train_valid_test_datasets,
                ModelType.encoder_or_decoder,
                forward_step,
                get_embedding_ranks=embedding_ranks,
            )
        except SystemExit as end:
            status = end.code
        writer = global_vars.get_tensorboard_writer()
        if writer:
            writer.close()
    files = frozenset(
        str(path.relative_to(folder)).partition(".out.tfevents")[0]
        for path in set(Path(folder).rglob("*")) - before
        if "cache" not in path.parts
    )
    return Trained(watch.steps, watch.evaluations, *watch.digests(), files, first + said.getvalue(), status)


class _Watch:
    """Sees the training loop."""

    def __init__(self):
        self.steps, self.evaluations = [], []
        self._model = self._optimizer = None

    @contextlib.contextmanager
    def installed(self):
        log, evaluate = training.training_log, training.evaluate
        setup = training.setup_model_and_optimizer

        def seen_setup(*args, **kwargs):
            self._model, self._optimizer, scheduler = setup(*args, **kwargs)
            return self._model, self._optimizer, scheduler

        def seen_log(losses, total, rate, iteration, scale, memory, skipped, norm, *args, **kwargs):
            groups = self._optimizer.param_groups if self._optimizer else []
            self.steps.append(
                {
                    **{name: float(value) for name, value in losses.items()},
                    "iteration": iteration,
                    "rate": rate,
                    "groups": [(group["lr"], group["weight_decay"]) for group in groups],
                    "scale": float(scale),
                    "norm": None if norm is None else float(norm),
                }
            )
            return log(losses, total, rate, iteration, scale, memory, skipped, norm, *args, **kwargs)

        def seen_evaluate(*args, **kwargs):
            found = evaluate(*args, **kwargs)
            self.evaluations.append({name: float(value) for name, value in (found[0] or {}).items()})
            return found

        with (
            mock.patch.object(training, "training_log", seen_log),
            mock.patch.object(training, "evaluate", seen_evaluate),
            mock.patch.object(training, "setup_model_and_optimizer", seen_setup),
        ):
            yield

    def digests(self):
        weights = [parameter.detach() for chunk in self._model for parameter in chunk.parameters()]
        trained = self._optimizer and not self._optimizer.is_stub_optimizer
        state = self._optimizer.state_dict() if trained else {}
        return _digest(weights), _digest(_tensors(state))


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value.detach()]
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    return [found for inner in value for found in _tensors(inner)] if isinstance(value, list | tuple) else []


def _digest(tensors):
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.contiguous().float().numpy().tobytes())
    return total.hexdigest()


@contextlib.contextmanager
def _alone():
    """Begin with nothing of the run before, and leave nothing."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    environment, level = dict(os.environ), logging.root.manager.disable
    threads, experimental = (
        torch.are_deterministic_algorithms_enabled(),
        megatron.core.config.ENABLE_EXPERIMENTAL,
    )
    _forget()
    logging.disable()
    try:
        with warnings.catch_warnings(), mock.patch.object(ft_integration, "setup"):
            warnings.simplefilter("ignore")
            yield
    finally:
        _forget()
        logging.disable(level)
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        gc.enable()
        torch.use_deterministic_algorithms(threads)
        megatron.core.config.ENABLE_EXPERIMENTAL = experimental


def _forget():
    if tracer := router_trace.get_moe_router_tracer():
        atexit.unregister(tracer.flush)  # into a folder that is gone by then
        router_trace._MOE_ROUTER_TRACER = None
    global_vars.unset_global_variables()
    destroy_rerun_state_machine()
    destroy_moe_metrics_tracker()
    # Of a backward pass outside of a training, which leaves a number where a training copies a tensor.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    MTPLossLoggingHelper.tracker = {}
    assert parallel_state.model_parallel_is_initialized()
