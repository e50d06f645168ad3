"""The command, killed with all its runs in the fourth iteration of the run with seed 2."""

import os
import signal
import sys

from megatron_periln.monitor.record import RunRecord
from megatron_periln.studies.__main__ import main

step = RunRecord.step


def deadly(self, iteration, **values):
    if "seed=2" in str(self.path) and iteration == 4:
        os.killpg(os.getpgrp(), signal.SIGKILL)
    step(self, iteration, **values)


if __name__ == "__main__":
    RunRecord.step = deadly
    sys.exit(main())
