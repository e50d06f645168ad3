"""Accidents, each called by every rank of a job before it starts."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from threading import Timer

import psutil
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.training import training

from megatron_periln.checkpoints import guard
from megatron_periln.checkpoints.fence import Fence
from megatron_periln.checkpoints.restart_attempt import RestartAttempt
from megatron_periln.errors import UsageError
from megatron_periln.training import run

SUCCESSOR = RestartAttempt("job 17, restart 1", job="17", restart=1, host="node7", process="")


def one_save_at_a_time():
    """Wait for an asynchronous save before the next begins, however slow the machine is."""
    save = training.save_checkpoint_and_time

    def patient(*args, **kwargs):
        training.maybe_finalize_async_save(blocking=True)
        return save(*args, **kwargs)

    training.save_checkpoint_and_time = patient


def superseded_before_saving():
    """SLURM requeues the job after its second save; its ranks live on."""
    before_save = guard.SaveGuard.before_save

    def late(self, folder, **kind):
        if folder.name == "iter_0000006":
            Fence.take(self.fence.folder, SUCCESSOR)
        before_save(self, folder, **kind)

    guard.SaveGuard.before_save = late


def superseded_while_saving():
    """SLURM requeues the job while its second checkpoint is being written."""
    finalize = guard.SaveGuard.finalize

    def late(self, tracker, text):
        if text == "4":
            Fence.take(self.fence.folder, SUCCESSOR)
        finalize(self, tracker, text)

    guard.SaveGuard.finalize = late


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

    def late(self, folder, **kind):
        before_save(self, folder, **kind)
        if folder.name == "iter_0000004":
            rank = psutil.Process()
            for process in (rank, *rank.children(recursive=True)):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    guard.SaveGuard.before_save = late


def read_only():
    """Its disk, ``DISK``, becomes read-only before its second save, as ext4 does after an error."""
    before_save = guard.SaveGuard.before_save

    def late(self, folder, **kind):
        if folder.name == "iter_0000004":
            subprocess.run(["mount", "-o", "remount,ro", os.environ["DISK"]], check=True)
        before_save(self, folder, **kind)

    guard.SaveGuard.before_save = late


def hangs():
    """Its disk, ``DISK``, hangs for ``SECONDS`` before its second checkpoint counts; ranks wait for 12."""
    finalize, parse = guard.SaveGuard.finalize, run.parse

    def late(self, tracker, text):
        if text == "4":
            disk, seconds = os.environ["DISK"], os.environ["SECONDS"]
            subprocess.run(["fsfreeze", "--freeze", disk], check=True)
            subprocess.Popen(
                ["sh", "-c", f"sleep {seconds}; fsfreeze --unfreeze {disk}"], start_new_session=True
            )
        finalize(self, tracker, text)

    def impatient():
        args = parse()
        args.distributed_timeout_minutes = 0.2
        return args

    guard.SaveGuard.finalize, run.parse = late, impatient


def launched():
    """Be the launcher of this rank, which goes on in another process."""
    pid = os.fork()
    if pid:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os.environ["TORCHELASTIC_RUN_ID"] = "none"


def endless_write():
    """What writes the checkpoint of iteration 4 never comes to an end."""
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data

    def slow(transforms, *, write_bucket, **kwargs):
        if "iter_0000004" in str(write_bucket[0]):
            time.sleep(3600)
        return write(transforms, write_bucket=write_bucket, **kwargs)

    filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(slow)


def children(kind):
    """Return the data workers of this rank, or the processes that write its checkpoints."""
    found = [child.pid for child in multiprocessing.active_children() if kind in str(child._target)]
    assert found, multiprocessing.active_children()
    return found


ENDS = {
    "exception": lambda: 1 / 0,
    "exit 3": lambda: sys.exit(3),
    "refusal": lambda: refuse("not here"),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
    "SIGHUP": lambda: os.kill(os.getpid(), signal.SIGHUP),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "launcher gone": lambda: (os.kill(os.getppid(), signal.SIGKILL), time.sleep(3600)),
    "worker killed": lambda: os.kill(children("_worker_loop")[0], signal.SIGKILL),
    "writer killed": lambda: (os.kill(children("async_loop")[0], signal.SIGKILL), time.sleep(3600)),
    "time is up": lambda: setattr(training, "_TRAIN_START_TIME", 0.0),
}


def refuse(message):
    raise UsageError(message)


def ends():
    """End the ranks ``WHO`` after their fifth step as ``END`` says."""
    step = training.train_step
    if os.environ["RANK"] not in os.environ["WHO"].split():
        return

    def last(*args, **kwargs):
        result = step(*args, **kwargs)
        if kwargs["iteration"] + 1 == 5:
            ENDS[os.environ["END"]]()
        return result

    training.train_step = last
