"""A change to a job: be the command, killed with all its runs in the fourth iteration of that with seed 2."""

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


def run():
    RunRecord.step = deadly
    sys.exit(main())
