"""Import a model of transformers as a checkpoint to go on training, and compare the logits of both."""

from megatron_periln.command_line import run_command
from megatron_periln.tools.import_hf import main

if __name__ == "__main__":
    run_command(main)
