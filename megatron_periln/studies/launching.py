"""Runs of a study, each in a process of its own: forked from this one, or by torchrun."""

from __future__ import annotations

import multiprocessing.util
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from megatron_periln.errors import UsageError
from megatron_periln.flag_files import device_of
from megatron_periln.studies.run_folder import DONE, RunFolder
from megatron_periln.studies.study import Study

__all__ = ["Launcher", "be_run", "check_run_flags", "is_forked", "prepare", "run_flags", "shares_of_gpus"]


def is_forked(study: Study) -> bool:
    """Tell whether runs are forks of this process: those of one process on the CPU.

    Importing Megatron costs seconds, a fork nothing. A process that has used a GPU can't be forked.
    """
    return study.ranks == 1 and _on_cpu(study.flags)


def _on_cpu(flags: Sequence[str]) -> bool:
    return device_of(" ".join(flags).split()) == "cpu"


def shares_of_gpus(study: Study, jobs: int, *, shared: bool = False) -> list[str | None]:
    """Return the ``CUDA_VISIBLE_DEVICES`` of each of ``jobs`` runs at a time, None for those on the CPU.

    With ``shared`` runs of one process take turns at the GPUs, several at one: small models leave it idle.

    Raises
    ------
    UsageError
        If fewer GPUs are visible than such runs need.
    """
    if all(_on_cpu(run.flags) for run in study.runs()):
        return [None] * jobs
    import torch  # seconds, which a list of the runs need not wait for

    count = torch.cuda.device_count()
    if shared and study.ranks > 1:
        raise UsageError(f"--share-gpus is for runs of one process, and ranks is {study.ranks}; drop it")
    if shared and not count:
        raise UsageError(
            "--share-gpus: no GPU is visible; make one visible (CUDA_VISIBLE_DEVICES), or drop it"
        )
    if not shared and count < jobs * study.ranks:
        raise UsageError(
            f"--jobs {jobs} with ranks: {study.ranks} takes {jobs * study.ranks} GPUs, and {count} are "
            "visible; give fewer --jobs, or make more visible (CUDA_VISIBLE_DEVICES)"
        )
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(number) for number in range(count)]
    if shared:
        return [gpus[job % len(gpus)] for job in range(jobs)]
    return [",".join(gpus[job * study.ranks : (job + 1) * study.ranks]) for job in range(jobs)]


def prepare(study: Study) -> None:
    """Import what runs, or the check of their flags, need."""
    from megatron_periln import cpu  # imports torch: seconds, which a list of the runs need not wait for

    if is_forked(study):
        try:
            cpu.activate()
        except RuntimeError as error:
            raise UsageError(str(error)) from error
    # Once, before runs are forked, and after the CPU stands in for the GPU.
    import torch.utils.tensorboard
    from megatron.core.tokenizers import MegatronTokenizer  # noqa: F401

    import megatron_periln.training.run  # noqa: F401

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def check_run_flags(study: Study) -> None:
    """Check that every run's flags are ones that the command line has, before any is run.

    Raises
    ------
    UsageError
        For the first that is not, with the run's name.
    """
    # Megatron's, after the CPU stands in for the GPU.
    from megatron_periln.megatron_arguments import megatron_parser
    from megatron_periln.training.parsing import add_arguments

    parser = megatron_parser(add_arguments)
    for run in study.runs():
        if run.seed == study.seeds[0]:
            try:
                parser.parse_args(run.flags)
            except UsageError as error:
                raise UsageError(f"{study.name}, run {run.name}: {error}") from error


def run_flags(study: Study, folder: RunFolder) -> list[str]:
    """Return the flags of a run, with those for its folder."""
    flags = [*folder.run.flags, "--monitor-layers", "all", "--monitor-file", str(folder.record)]
    flags += ["--no-check-for-nan-in-loss-and-grad"]  # else the run ends before its record says why
    if study.save:
        checkpoints = str(folder.path / "checkpoints")
        flags += ["--save", checkpoints, "--load", checkpoints, "--monitor-stop-on", "nan"]
    return flags


@dataclass
class Launcher:
    """Starts runs and waits for them, as many at a time as there are shares.

    Parameters
    ----------
    study
        Theirs.
    shares
        Of `shares_of_gpus`, those that no run has now.
    about
        What is written beside each result: commit, versions.
    """

    study: Study
    shares: list[str | None]
    about: dict[str, Any]
    _running: dict[int, tuple[RunFolder, int, str | None]] = field(default_factory=dict)

    def run(self, folders: Sequence[RunFolder], on_end: Callable[[RunFolder, str], None]) -> None:
        """Run all of ``folders``; ``on_end`` is told the status of each as it ends.

        A folder that another process has is told as ``elsewhere``, one that it finished meanwhile with its
        status. When this function is left by an exception, such as Ctrl-C, the runs are ended; they start
        again next time.
        """
        waiting = list(reversed(folders))
        try:
            while waiting or self._running:
                while waiting and self.shares:
                    folder = waiting.pop()
                    if (status := self._start(folder)) is not None:
                        on_end(folder, status)
                if self._running:
                    on_end(*self._wait())
        finally:
            for pid in self._running:
                os.kill(pid, signal.SIGTERM)
            for pid in self._running:
                os.waitpid(pid, 0)

    def _start(self, folder: RunFolder) -> str | None:
        """Start a run, or return why not."""
        lock = folder.lock()
        if lock is None:
            return "elsewhere"
        status: str = folder.read()["status"]
        if status in DONE:
            os.close(lock)
            return status
        folder.begin(self.about)
        share = self.shares.pop(0)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            for _, of_another, _ in self._running.values():
                os.close(of_another)
            os.set_inheritable(lock, True)  # held as long as the run lives, should this process be killed
            if share is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = share
            be_run(self.study, folder)
        self._running[pid] = (folder, lock, share)
        return None

    def _wait(self) -> tuple[RunFolder, str]:
        pid, status = os.waitpid(-1, 0)
        while pid not in self._running:
            pid, status = os.waitpid(-1, 0)
        folder, lock, share = self._running.pop(pid)
        self.shares.append(share)
        outcome = folder.end(os.waitstatus_to_exitcode(status), self.study.diverged_above)
        os.close(lock)
        return folder, outcome


def be_run(study: Study, folder: RunFolder) -> NoReturn:
    """Be a run until it ends."""
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        mode = os.O_APPEND if study.save else os.O_TRUNC
        log = os.open(folder.log, os.O_WRONLY | os.O_CREAT | mode)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # In a file: torchrun may take some of Megatron's flags for short forms of its own.
        flags = folder.path / "run.flags"
        flags.write_text("\n".join(shlex.quote(flag) for flag in run_flags(study, folder)) + "\n")
        if not is_forked(study):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            torchrun += ["--nproc-per-node", str(study.ranks), "-m", "megatron_periln.pretrain"]
            os.execv(sys.executable, [*torchrun, f"@{flags}"])
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        # Port 0: nobody else has to know where the only rank's store listens.
        os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        from megatron_periln import pretrain  # its clock starts when it is imported

        sys.argv = ["pretrain", f"@{flags}"]
        pretrain.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        # Ends the checkpoint writer's processes.
        multiprocessing.util._exit_function()  # type: ignore[attr-defined]
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
