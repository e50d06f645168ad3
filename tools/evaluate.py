"""Evaluate a checkpoint or an exported model: its loss on a dataset, or lm-evaluation-harness."""

from megatron_periln.command_line import run_command
from megatron_periln.tools.evaluate import main

if __name__ == "__main__":
    run_command(main)
