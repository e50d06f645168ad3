"""Tokenize text into Megatron's indexed datasets, with the flags of Megatron-LM's tool."""

from megatron_periln.command_line import run_command
from megatron_periln.tools.preprocess_data import main

if __name__ == "__main__":
    run_command(main)
