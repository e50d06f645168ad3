"""Say what an indexed dataset holds, and verify that it is what was written."""

from megatron_periln.command_line import run_command
from megatron_periln.tools.inspect_dataset import main

if __name__ == "__main__":
    run_command(main)
