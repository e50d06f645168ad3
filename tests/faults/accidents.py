"""Accidents, each called by every rank of a job before it starts."""

import os
import resource
import signal
from threading import Timer

import psutil
from megatron.training import training

from megatron_periln.checkpoints import guard
from megatron_periln.checkpoints.fence import Fence
from megatron_periln.checkpoints.incarnation import Incarnation

SUCCESSOR = Incarnation("job 17, restart 1", job="17", restart=1, host="node7", process="")


def superseded_before_saving():
    """SLURM requeues the job after its second save; its ranks live on."""
    before_save = guard.SaveGuard.before_save

    def late(self, folder):
        if folder.name == "iter_0000006":
            Fence.take(self.fence.folder, SUCCESSOR)
        before_save(self, folder)

    guard.SaveGuard.before_save = late


def superseded_while_saving():
    """SLURM requeues the job while its second checkpoint is being written."""
    publish = guard.SaveGuard.publish

    def late(self, tracker, text):
        if text == "4":
            Fence.take(self.fence.folder, SUCCESSOR)
        publish(self, tracker, text)

    guard.SaveGuard.publish = late


def killed():
    """Kill a rank, as ``KILL`` says: which, in a step or in a save, of which iteration, how much later."""
    victim, moment, iteration, delay = os.environ["KILL"].split()
    if os.environ["RANK"] != victim:
        return
    function = {"step": "train_step", "save": "save_checkpoint"}[moment]
    original = getattr(training, function)

    def fatal(*args, **kwargs):
        now = kwargs["iteration"] + 1 if moment == "step" else args[0]
        if now == int(iteration):
            Timer(float(delay), os.kill, (os.getpid(), signal.SIGKILL)).start()
        return original(*args, **kwargs)

    setattr(training, function, fatal)


def disk_full():
    """Let no file grow past what its second checkpoint needs, whichever process writes it."""
    before_save = guard.SaveGuard.before_save

    def late(self, folder):
        before_save(self, folder)
        if folder.name == "iter_0000004":
            rank = psutil.Process()
            for process in (rank, *rank.children(recursive=True)):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    guard.SaveGuard.before_save = late
