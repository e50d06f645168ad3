"""Export a checkpoint to a model of transformers, and compare the logits of both."""

from megatron_periln.command_line import run_command
from megatron_periln.tools.export_hf import main

if __name__ == "__main__":
    run_command(main)
