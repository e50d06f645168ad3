"""Accidents, each called by every rank of a job before it starts."""

from pathlib import Path

from megatron_periln.checkpoints import guard
from megatron_periln.checkpoints.fence import Fence
from megatron_periln.checkpoints.incarnation import Incarnation

SUCCESSOR = Incarnation("job 17, restart 1", job="17", restart=1, host="node7", process="")


def superseded_before_saving():
    """SLURM requeues the job after its second save; its ranks live on."""
    before_save = guard.SaveGuard.before_save

    def late(self, iteration):
        if iteration == 6:
            Fence.take(Path(self.fence.folder), SUCCESSOR)
        before_save(self, iteration)

    guard.SaveGuard.before_save = late


def superseded_while_saving():
    """SLURM requeues the job while its second checkpoint is being written."""
    publish = guard.SaveGuard.publish

    def late(self, tracker, text):
        if text == "4":
            Fence.take(Path(self.fence.folder), SUCCESSOR)
        publish(self, tracker, text)

    guard.SaveGuard.publish = late
