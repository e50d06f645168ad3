"""Building, loading, running and saving a whole GPT in this process alone, on the CPU."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from megatron_periln.checkpoints.manifest import Manifest
from megatron_periln.checkpoints.reader import NORM_BEFORE_EXPERTS
from megatron_periln.errors import UsageError
from megatron_periln.models import GPTModelBuilder, GPTModelConfig
from megatron_periln.models.execution import arguments_of_one_process, refuse_other_computation
from megatron_periln.models.from_arguments import gpt_config_from_args
from megatron_periln.norms.arguments import placement_of
from megatron_periln.patches.rotary import rotated_at

__all__ = [
    "build_model",
    "inverse_frequencies",
    "load_model",
    "megatron_config",
    "megatron_logits",
    "save_model",
    "single_process",
]


def megatron_config(args: Namespace, dtype: torch.dtype = torch.float32) -> GPTModelConfig:
    """Return the configuration of a model, to be run in one process.

    Parameters
    ----------
    args
        Megatron's arguments, as they are saved with a checkpoint: of a GPT, in any parallel layout.
    dtype
        Of the parameters.

    Raises
    ------
    UsageError
        If one process would not compute the model as training did, or can't build it.
    """
    refuse_other_computation(args)
    alone = arguments_of_one_process(args)
    alone.params_dtype = dtype
    alone.bf16, alone.fp16 = dtype is torch.bfloat16, dtype is torch.float16
    try:
        config = gpt_config_from_args(alone, model_config_cls=GPTModelConfig)
    except (AssertionError, ImportError, ValueError) as error:
        raise UsageError(f"Megatron can't build this model in one process: {error}") from error
    config.norm_placement = placement_of(args)
    return config


@contextmanager
def single_process() -> Iterator[None]:
    """Set up Megatron's parallel state for one process, unless it stands already."""
    if parallel_state.model_parallel_is_initialized():
        yield
        return
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build_model(config: GPTModelConfig) -> GPTModel:
    """Build the model of a configuration, whole, in evaluation mode; within `single_process`."""
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = GPTModelBuilder(config).build_model(groups, pre_process=True, post_process=True)
    model = model.to(config.transformer.params_dtype)  # upstream's local norms are built in fp32
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module._maintain_float32_expert_bias()
    return model.eval()


def load_model(path: Path, config: GPTModelConfig, absent: tuple[str, ...] = ()) -> GPTModel:
    """Build the model of a configuration, and load a checkpoint of any layout into it.

    Parameters
    ----------
    path
        The checkpoint's folder, of one iteration.
    config
        As `megatron_config` returns it.
    absent
        Parts of names: parameters that the checkpoint does not have, and that keep their
        initial values.
    """
    model = build_model(config)
    state = {
        name: sharded
        for name, sharded in model.sharded_state_dict().items()
        if not any(part in name for part in absent)
    }
    if config.transformer.num_moe_experts is not None:
        _find_norms_before_experts(state, path)
    loaded = dist_checkpointing.load({"model": state}, str(path))["model"]
    left = model.load_state_dict(loaded, strict=False)
    assert not left.unexpected_keys, left
    assert all(any(part in name for part in absent) for name in left.missing_keys), left
    return model


def _find_norms_before_experts(state: dict[str, Any], path: Path) -> None:
    """Ask for the norm before a layer's experts by the name that it has in a checkpoint."""
    # Megatron's own reading of names takes a fix that only training applies.
    there = FileSystemReader(path).read_metadata().state_dict_metadata
    for sharded in state.values():
        if isinstance(sharded, ShardedTensor) and sharded.key not in there:
            sharded.key = sharded.key.replace(*NORM_BEFORE_EXPERTS)


def _under_both_names(state: dict[str, Any]) -> dict[str, Any]:
    """Add the norm before a layer's experts as Transformer Engine's layers name it.

    Megatron's local layers save it as the norm of a dense MLP, for which Transformer Engine's don't ask.
    """
    layers = {name.split(".mlp.")[0] for name in state if ".mlp.experts." in name}
    added = {}
    for layer in layers:
        for name in (f"{layer}.pre_mlp_layernorm.weight", f"{layer}.pre_mlp_layernorm.bias"):
            if name in state:
                key = state[name].key.replace(*NORM_BEFORE_EXPERTS)
                added[f"{name} of Transformer Engine"] = replace(state[name], key=key)
    return state | added


def save_model(folder: Path, args: Namespace, model: GPTModel) -> Path:
    """Save a model as the checkpoint that training starts from, with its manifest, and return its folder.

    Megatron calls such a checkpoint a release: it has no optimizer, and training starts at
    iteration 0.

    Parameters
    ----------
    folder
        What ``--load`` will take.
    args
        Megatron's arguments, to be saved with it.
    model
        One that `build_model` has built.
    """
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    path = folder / "release"
    path.mkdir()
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
    state["model"] = _under_both_names(model.sharded_state_dict())
    dist_checkpointing.save(state, str(path), async_strategy="mcore")
    Manifest.of(path, sums=True).write(path)
    return path


def megatron_logits(model: GPTModel, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return the logits of tokens.

    Parameters
    ----------
    model
        One that `build_model` has built.
    tokens
        ``[batch, sequence]``.
    positions
        ``[sequence]``, for a model with rotary embeddings; None for 0, 1, 2 and so on.

    Returns
    -------
    Tensor
        ``[batch, sequence, vocabulary]``.
    """
    if positions is not None:
        with rotated_at(model.rotary_pos_emb, positions):
            return megatron_logits(model, tokens)
    counted = torch.arange(tokens.size(1)).expand_as(tokens)
    with torch.inference_mode():
        return model(tokens, counted, None)


def inverse_frequencies(model: GPTModel) -> Tensor:
    """Return by how many radians each rotary pair turns from one position to the next."""
    rope = model.rotary_pos_emb
    embedding = rope.get_emb(2)
    angles = (embedding[0] if isinstance(embedding, tuple) else embedding)[1].flatten()
    return angles[::2] if rope.rotary_interleaved else angles[: len(angles) // 2]
