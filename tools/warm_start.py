"""Start Peri-LN training from a Pre-LN checkpoint: insert output norms, their weights fitted to data."""

from megatron_periln.command_line import run_command
from megatron_periln.tools.warm_start import main

if __name__ == "__main__":
    run_command(main)
