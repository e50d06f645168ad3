"""Merge indexed datasets, with the flags of Megatron-LM's tool and its bytes."""

from megatron_periln.command_line import run_command
from megatron_periln.tools.merge_datasets import main

if __name__ == "__main__":
    run_command(main)
