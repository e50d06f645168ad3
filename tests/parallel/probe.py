"""Records a training job from inside: losses, gradient norms, every gradient of its first step."""

import json
from pathlib import Path

from megatron.core import dist_checkpointing, mpu
from megatron.core.utils import unwrap_model
from megatron.training import checkpointing, training


def install(folder):
    """Write ``curve.json`` and, with ``--save-wgrads-interval``, the checkpoint ``gradients``."""
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
        if not (folder / "gradients").exists():
            save_gradients(unwrap_model(models[0]), folder / "gradients")

    training.training_log = recording_log
    training.get_megatron_optimizer = remembering_optimizer
    training.save_grads = save_first_gradients


def save_gradients(chunks, folder):
    """Save the reduced gradients as the weights of a checkpoint, which Megatron gathers to full shape."""
    import torch

    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        folder.mkdir()
    torch.distributed.barrier()
    parameters = [
        parameter for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad
    ]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad.to(parameter.dtype)
    metadata = checkpointing._build_sharded_state_dict_metadata(training.get_args())
    dist_checkpointing.save(
        {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)},
        str(folder),
    )
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
