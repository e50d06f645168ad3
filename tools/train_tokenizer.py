"""Train a tokenizer on text, in a format that Megatron loads."""

from megatron_periln.command_line import run_command
from megatron_periln.tools.train_tokenizer import main

if __name__ == "__main__":
    run_command(main)
