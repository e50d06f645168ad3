"""A small model and its distributed optimizers, in a world of one process."""

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig


def build_optimizers(experts=False, shared_embedding=False):
    """Return a model of four parameters, and Megatron's chain of optimizers.

    With ``experts`` its second layer counts as an expert, which has an optimizer of its own; with
    ``shared_embedding`` its first counts as an embedding that two pipeline stages share, which has
    a bucket of its own.
    """
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    torch.manual_seed(5)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    if experts:
        for parameter in layers[1].parameters():
            parameter.allreduce = False
    layers[0].weight.shared_embedding = shared_embedding
    model = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1),
        DistributedDataParallelConfig(use_distributed_optimizer=True),
        layers,
    )
    config = OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True, clip_grad=0.0)
    return model, get_megatron_optimizer(config, [model])


def build_optimizer(**options):
    model, optimizers = build_optimizers(**options)
    (optimizer,) = optimizers.chained_optimizers
    return model, optimizer


def train(model, optimizer, iterations=1):
    for _ in range(iterations):
        model.zero_grad_buffer()
        model(torch.linspace(-1, 1, 8).view(2, 4)).sum().backward()
        model.finish_grad_sync()
        optimizer.step()


def steps(optimizer):
    return [state["step"] for state in optimizer.optimizer.state.values()]


def weights(model):
    return [parameter.detach().clone().tolist() for parameter in model.parameters()]
