"""Compare monitored runs: one HTML page with their losses, gradients, variances and alerts."""

from megatron_periln.command_line import run_command
from megatron_periln.tools.report import main

if __name__ == "__main__":
    run_command(main)
