"""Changes to jobs: one process that stands for all of a recipe's, and stops when everything is built."""

import os
import sys
from pathlib import Path


def alone():
    """Let this process be the first of its world, whose others never answer nor are waited for."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init, new_group = torch.distributed.init_process_group, torch.distributed.new_group

    def fake_group(*args, **kwargs):
        kwargs.pop("backend", None)
        kwargs.pop("pg_options", None)
        return new_group(*args, backend="fake", **kwargs)

    torch.distributed.new_group = fake_group
    size = int(os.environ["WORLD_SIZE"])
    init(backend="fake", store=FakeStore(), rank=0, world_size=size)
    torch.distributed.init_process_group = lambda *args, **kwargs: None
    _answer_for_all()


def _answer_for_all():
    """Let what ranks say to each other before there are process groups be said by the first alone."""
    from megatron_periln.checkpoints.rendezvous import Rendezvous

    def be_alone(self, args):
        self.rank, self.size = 0, 1

    Rendezvous.__init__ = be_alone


def stop_when_built():
    """End before the first step, everything being built: model, optimizer, data."""
    from megatron.training import training

    def stop(*args, **kwargs):
        print("BUILT", flush=True)
        sys.exit(0)

    training.train = stop


def packages_stand_in():
    """Let the packages that tests do without, and that compute nothing, be found in packages/."""
    sys.path.insert(0, str(Path(__file__).parent / "packages"))
