"""Makes training slow enough to be disturbed: on PYTHONPATH, Python imports this by itself.

SLOW_STEP is what a step takes longer, SLOW_SAVE what a checkpoint does, in seconds, in the first
SLOW_STARTS starts of a job, 1 by default. UNFENCED takes the fence from checkpoint folders.
"""

import os
import sys
import time
from importlib.abc import MetaPathFinder
from importlib.util import find_spec


def slow_down(training):
    if "UNFENCED" in os.environ:
        from megatron_periln.checkpoints.fence import Fence

        Fence.check = lambda self: None
    step, save = training.train_step, training.save_checkpoint

    def slow_step(*args, **kwargs):
        time.sleep(float(os.environ.get("SLOW_STEP", "0")))
        return step(*args, **kwargs)

    def slow_save(iteration, *args, **kwargs):
        print(f"slow save of iteration {iteration}", flush=True)
        time.sleep(float(os.environ.get("SLOW_SAVE", "0")))
        return save(iteration, *args, **kwargs)

    training.train_step, training.save_checkpoint = slow_step, slow_save


class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "megatron.training.training":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        load = spec.loader.exec_module

        def load_and_slow_down(module):
            load(module)
            slow_down(module)

        spec.loader.exec_module = load_and_slow_down
        return spec


START = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
if "RANK" in os.environ and int(os.environ.get("SLOW_STARTS", "1")) > START:
    sys.meta_path.insert(0, Finder())
