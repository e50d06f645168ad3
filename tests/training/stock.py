"""Turns a job into one of stock Megatron: its model, and checkpoints that say nothing of placements."""

import copy

from megatron.training import checkpointing
from megatron.training.models.gpt import GPTModelConfig

from megatron_periln.training import run

OURS = (
    "norm_placement",
    "embedding_norm",
    "output_norm_init",
    "freeze_output_norm",
    "output_norm_epsilon",
    "device",
    "monitor_interval",
    "monitor_layers",
    "monitor_file",
    "monitor_stop_on",
)


def use_stock_model():
    run.GPTModelConfig = GPTModelConfig
    generate = checkpointing.generate_state_dict

    def generate_stock_state(args, *rest, **named):
        state = generate(args, *rest, **named)
        state["args"] = copy.copy(args)
        for name in OURS:
            delattr(state["args"], name)
        return state

    checkpointing.generate_state_dict = generate_stock_state
