"""Records a training job from inside: losses, gradient norms, every gradient of its first step."""

import json
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica
from megatron.core.utils import unwrap_model
from megatron.training import checkpointing, training


def install(folder):
    """Write ``curve.json`` and, with ``--save-wgrads-interval``, ``gradients``."""
    folder = Path(folder)
    curve, models = [], []
    log, get_optimizer = training.training_log, training.get_megatron_optimizer

    def recording_log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs):
        losses = {name: float(value) for name, value in loss_dict.items()}
        grad_norm = kwargs.get("grad_norm", args[3] if len(args) > 3 else None)
        curve.append({"iteration": iteration, "grad norm": grad_norm, **losses})
        if mpu.is_pipeline_last_stage(ignore_virtual=True) and mpu.get_data_parallel_rank() == 0:
            (folder / "curve.json").write_text(json.dumps(curve))
        return log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)

    def remembering_optimizer(config, model, *args, **kwargs):
        models.append(model)
        return get_optimizer(config, model, *args, **kwargs)

    def save_first_gradients(save_dir, state_dict, iteration, label):
        if models:
            save_gradients(unwrap_model(models.pop()), folder / "gradients")

    training.training_log = recording_log
    training.get_megatron_optimizer = remembering_optimizer
    training.save_grads = save_first_gradients


def save_gradients(chunks, folder):
    """Save this rank's parts of the reduced gradients, with where they belong in the whole ones.

    As Megatron saves weights, which these become for a moment: a part that several ranks hold is one's.
    """
    parameters = [
        parameter for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad
    ]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad.to(parameter.dtype)
    metadata = checkpointing._build_sharded_state_dict_metadata(training.get_args())
    state = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    apply_factories(state)
    parts = [
        (part.key, part.global_shape, part.global_offset, part.data[(None,) * part.prepend_axis_num].clone())
        for part in nested_values(state)
        if isinstance(part, ShardedTensor) and is_main_replica(part.replica_id)
    ]
    folder.mkdir(exist_ok=True)
    torch.save(parts, folder / f"rank{torch.distributed.get_rank()}.pt")
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
