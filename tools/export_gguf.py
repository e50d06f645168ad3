"""Write an exported model as a GGUF file for llama.cpp, and compare token ids and logits there."""

from megatron_periln.command_line import run_command
from megatron_periln.tools.export_gguf import main

if __name__ == "__main__":
    run_command(main)
