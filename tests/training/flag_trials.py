"""What a flag does to a model: small models are built from flags, run at fixed parameters, and compared."""

import contextlib
import dataclasses
import enum
import functools
import io
import re
import warnings
import zlib
from argparse import ArgumentParser
from unittest import mock

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.training.arguments import add_megatron_arguments
from megatron.training.models.base import compose_hooks

from megatron_periln.models import GPTModelBuilder
from megatron_periln.models.hybrid import HybridModelBuilder
from megatron_periln.training import parsing
from megatron_periln.training.run import model_config_of

SEQUENCE, VOCABULARY = 16, 63
COMMON = f"""
    --device cpu --num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4
    --normalization RMSNorm --swiglu --disable-bias-linear
    --position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0
    --hidden-dropout 0 --seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --mock-data
    --tokenizer-type NullTokenizer --vocab-size {VOCABULARY} --make-vocab-size-divisible-by 64
    --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --train-iters 6 --eval-interval 1000 --seed 7
"""
MOE = "--num-experts 4 --moe-ffn-hidden-size 48"
MLA = (
    "--multi-latent-attention --kv-lora-rank 16 --q-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 8 "
    "--v-head-dim 8"
)
GQA = "--group-query-attention --num-query-groups 2"
MODELS = {
    "dense": GQA,
    "moe": f"{GQA} {MOE}",
    "mla": MLA,
    "hybrid": f"{GQA} {MOE} --hybrid-layer-pattern *-*E",
}
"""Those that are run, in Megatron's local layers; ``te`` is compared by its specs and configuration."""


@functools.cache
def parser():
    """Megatron's parser and ours, which takes half a second to make."""
    made = ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(made)
    return parsing.add_arguments(made)


def parse(flags, *, te=False):
    """Parse and check flags as training does; return the arguments, and what was printed."""
    words = without_removed(f"{COMMON} {flags}".split())
    said = io.StringIO()
    with contextlib.redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = parser().parse_args([word.replace("␣", " ") for word in words])
        args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
        args.rank, args.world_size = 0, 1
        with (
            mock.patch("megatron_periln.cpu.is_active", lambda: not te),
            mock.patch("megatron.training.arguments._print_args"),  # 800 lines, a fifth of the time
        ):
            parsing.check(args, parser())
    return args, said.getvalue()


def without_removed(words):
    """Return ``words`` without each flag, and its values, that a ``~FLAG`` after it takes away."""
    while removals := [word for word in words if word.startswith("~")]:
        marker = words.index(removals[0])
        del words[marker]
        while removals[0][1:] in words[:marker]:
            first = words.index(removals[0][1:])
            last = first + 1
            while last < marker and not words[last].startswith(("-", "~")):
                last += 1
            del words[first:last]
            marker -= last - first
    return words


def describe(value):
    """Return something comparable for a configuration's values and for layer specs."""
    if isinstance(value, enum.Enum | str | int | float | bool | None | torch.dtype):
        return str(value)
    if isinstance(value, functools.partial):
        return [describe(value.func), describe(value.args), describe(value.keywords)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, {name: describe(inner) for name, inner in vars(value).items()}]
    if hasattr(value, "module") and hasattr(value, "submodules"):
        return [describe(value.module), describe(value.params), describe(value.submodules)]
    if isinstance(value, dict):
        return {str(name): describe(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [describe(inner) for inner in value]
    return re.sub(r" at 0x[0-9a-f]+", "", getattr(value, "__qualname__", str(value)))


def settle(model):
    """Give every parameter values that depend on its name and shape alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values + 1 if "norm" in name else values)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a model computes at fixed parameters."""

    names: dict
    loss: float
    training_loss: float
    training_gradients: dict
    start: dict

    def same_model(self, other):
        return self.names == other.names and close(self.loss, other.loss)

    def same_training(self, other):
        mine, others = self.training_gradients, other.training_gradients
        return (
            close(self.training_loss, other.training_loss)
            and mine.keys() == others.keys()
            and all(close(norm, others[name]) for name, norm in mine.items())
        )


def close(one, other, tolerance=2e-5):
    return abs(one - other) <= tolerance * max(abs(one), abs(other), 1e-4)


def build(args):
    config = model_config_of(args)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    torch.manual_seed(7)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder = HybridModelBuilder if args.hybrid_layer_pattern else GPTModelBuilder
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = builder(config).build_model(groups, pre_process=True, post_process=True)
        (model,) = compose_hooks(config.pre_wrap_hooks)([model])
    return model.to(args.params_dtype)


def losses(model, training):
    """Return the loss and the norm of each gradient, of one batch."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(VOCABULARY, (2, SEQUENCE + 1), generator=generator)
    positions = torch.arange(SEQUENCE).expand(2, -1)
    model.train(training)
    model.zero_grad()
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    torch.manual_seed(7)
    loss = model(ids[:, :-1].contiguous(), positions, None, labels=ids[:, 1:].contiguous()).float().mean()
    if loss.requires_grad:
        loss.backward()
    norms = {
        name: parameter.grad.float().norm().item()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.item(), norms


def run(args):
    """Build the model of checked arguments and run it."""
    destroy_moe_metrics_tracker()  # its tables and the next have the size of the first model's layers
    MTPLossLoggingHelper.tracker = {}
    model = build(args)
    start = {name: parameter.detach().float().norm().item() for name, parameter in model.named_parameters()}
    settle(model)
    return Outcome(
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        losses(model, False)[0],
        *losses(model, True),
        start,
    )
