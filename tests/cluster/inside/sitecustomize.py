"""Watches training from inside and slows it down: on PYTHONPATH, Python imports this by itself.

Rank 0 prints the exact loss and gradient norm of every step; Megatron rounds them, and prints the mean
of a start's first two losses as its second. SLOW_STEP is what a step takes longer, SLOW_SAVE what a
checkpoint does, in seconds, in the first SLOW_STARTS starts of a job, 1 by default.
"""

import os
import sys
import time
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

SLOW = int(os.environ.get("SLURM_RESTART_COUNT", "0")) < int(os.environ.get("SLOW_STARTS", "1"))


def watch(training):
    step, log, save = training.train_step, training.training_log, training.save_checkpoint

    def slow_step(*args, **kwargs):
        time.sleep(float(os.environ.get("SLOW_STEP", "0")) * SLOW)
        return step(*args, **kwargs)

    def exact_log(losses, total, learning_rate, iteration, *args, **kwargs):
        norm = kwargs.get("grad_norm", args[3] if len(args) > 3 else None)
        if os.environ["RANK"] == "0":
            print(f"step {iteration}: {float(losses['lm loss']).hex()} {float(norm).hex()}", flush=True)
        return log(losses, total, learning_rate, iteration, *args, **kwargs)

    def slow_save(iteration, *args, **kwargs):
        time.sleep(float(os.environ.get("SLOW_SAVE", "0")) * SLOW)
        return save(iteration, *args, **kwargs)

    training.train_step, training.training_log, training.save_checkpoint = slow_step, exact_log, slow_save


class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "megatron.training.training":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        load = spec.loader.exec_module

        def load_and_watch(module):
            load(module)
            watch(module)

        spec.loader.exec_module = load_and_watch
        return spec


if "RANK" in os.environ:
    sys.meta_path.insert(0, Finder())
