"""Counts in a rank of a real job what it holds: what `megatron_periln.plan` says it will."""

import json
import weakref

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model
from megatron.training import training


def storages(tensors):
    """Return the bytes of each storage of these tensors, by its address."""
    return {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor is not None
    }


def count_what_is_held():
    """Print one line of JSON after the first step: bytes by what they are, saved ones by virtual stage."""
    saved, forward, step = {}, DistributedDataParallel.forward, training.train_step

    def counting_forward(chunk, *args, **kwargs):
        stage = getattr(unwrap_model(chunk), "vp_stage", None) or 0
        if stage in saved or not torch.is_grad_enabled():
            return forward(chunk, *args, **kwargs)
        own = storages(_owned(chunk))
        found = saved[stage] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = weakref.ref(storage)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = forward(chunk, *args, **kwargs)
        # Some are freed once they are saved, to be computed again.
        there = {address: ref() for address, ref in found.items() if address not in own}
        saved[stage] = sum(storage.nbytes() for storage in there.values() if storage is not None)
        return output

    def counting_step(forward_step, data_iterator, model, optimizer, *args, **kwargs):
        result = step(forward_step, data_iterator, model, optimizer, *args, **kwargs)
        if saved:
            print("\nheld", json.dumps(_held(model, optimizer, saved)), flush=True)
            saved.clear()
            DistributedDataParallel.forward, training.train_step = forward, step
        return result

    DistributedDataParallel.forward, training.train_step = counting_forward, counting_step


def _buffers(chunk):
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def _owned(chunk):
    flat = [tensor for buffer in _buffers(chunk) for tensor in (buffer.param_data, buffer.grad_data)]
    return [*chunk.parameters(), *unwrap_model(chunk).buffers(), *flat]


def _held(model, optimizer, saved):
    weights = [
        tensor
        for chunk in model
        for tensor in (*chunk.parameters(), *(buffer.param_data for buffer in _buffers(chunk)))
    ]
    masters, moments = {}, {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "is_stub_optimizer", False):
            continue
        for group in (
            *getattr(part, "shard_fp32_from_float16_groups", ()),
            *getattr(part, "fp32_from_float16_groups", ()),
        ):
            masters |= storages(group)
        for state in part.optimizer.state.values():
            moments |= storages(value for name, value in state.items() if name != "step")
    return {
        "rank": torch.distributed.get_rank(),
        "weights": sum(storages(weights).values()),
        "gradients": sum(
            storages(buffer.grad_data for chunk in model for buffer in _buffers(chunk)).values()
        ),
        "master weights": sum(masters.values()),
        "moments": sum(moments.values()),
        "saved": [size for _, size in sorted(saved.items())],
    }
