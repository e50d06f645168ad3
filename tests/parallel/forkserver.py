"""Runs training jobs from one process that has imported everything once.

It says the name of the socket at which it listens, until its standard input says or meets an end, and
forks itself for each connection. The fork reads its environment, then one JSON job a line, forks the
job's ranks, and answers with one JSON line, until a line says end.
Importing torch, Megatron and transformers costs seconds a process; a fork costs nothing, and without a
GPU nothing speaks against it.
"""

import argparse
import atexit
import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import json
import multiprocessing.util
import os
import selectors
import shlex
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from tests import help_texts
from tests.ports import free_port

# What Megatron imports in every rank, but in functions.
LATE = (
    "megatron.core.datasets.helpers",
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
    "megatron.core.models.mimo",
    "multiprocessing.managers",
    "multiprocessing.pool",
)


def warm_up():
    from megatron_periln import cpu

    cpu.activate()
    import torch
    import torch.utils.tensorboard
    from megatron.core.tokenizers import MegatronTokenizer

    import megatron_periln.training.run  # noqa: F401
    from megatron_periln.patches import fixes
    from megatron_periln.training.idle_flags import idle_flags, is_idle
    from megatron_periln.training.parsing import parse_words
    from tests.parallel import probe  # noqa: F401
    from tests.parallel.jobs import COMMON

    fixes.apply()
    for name in LATE:
        importlib.import_module(name)
    # After the fixes, which then do as in a rank: 1.4 s a rank whose tokenizer is one of transformers'.
    importlib.import_module("transformers").AutoTokenizer  # noqa: B018
    MegatronTokenizer.from_pretrained(metadata_path={"library": "null-text"}, vocab_size=257)
    help_texts.read_once()
    # Then parsers are built, flags are looked up by patterns, and torch asks for its plugins: 0.02 s a rank.
    sys.argv = ["pretrain", *shlex.split(COMMON), "--mock-data", "--norm-placement", "peri"]
    args, parser, _ = parse_words()
    idle_flags(args, parser)
    for name in vars(args):
        is_idle(name, args)
    prepare_a_parser()
    importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)
    importlib.metadata.entry_points(group="torch.distributed.backends")
    torch.set_num_threads(1)
    # Ranks then neither look for garbage among what is imported, which copies its pages: 0.3 s a rank.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)  # a hundredth of a rank's time was looking for garbage of its own
    atexit.register(gc.unfreeze)  # or nanobind lists leaks


def prepare_a_parser():
    """Build a parser for the first one that a rank needs: 0.01 s a rank."""
    from megatron.training import arguments

    add = arguments.add_megatron_arguments
    prepared = [add(argparse.ArgumentParser(description="Megatron-LM Arguments", allow_abbrev=False))]

    def add_once(parser):
        if not prepared:
            return add(parser)
        vars(parser).update(vars(prepared.pop()))
        return parser

    arguments.add_megatron_arguments = add_once


def run_rank(job, rank, port):
    """Be rank ``rank`` of ``job`` until it ends; never returns."""
    status = 1
    os.setpgid(0, 0)
    # As a launcher starts a rank: tests may run in the background, where a shell ignores both.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        size = str(job["ranks"])
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **job.get("environment", {}))
        log = os.open(f"{job['folder']}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from megatron_periln import pretrain
        from tests.parallel import probe

        sys.argv = ["pretrain", *job["arguments"]]
        probe.install(job["folder"])
        for name in job.get("changes", []):
            module, function = name.rsplit(".", 1)
            getattr(importlib.import_module(module), function)()
        pretrain.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.last_exc = end  # what its frames hold, such as data workers, is there until the end, as in a rank
    except BaseException as error:
        traceback.print_exc()
        sys.last_exc = error
    finally:
        # Ends the checkpoint writer's processes, which os._exit would orphan.
        multiprocessing.util._exit_function()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def members(groups):
    """Return the command lines of the processes in these groups; "" of the ended, until reaped."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[2]) in groups:
                found.append(path.with_name("cmdline").read_text().replace("\0", " "))
    return found


def run_job(job):
    port, ranks, orphans = free_port(), {}, []
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid == 0:
            run_rank(job, rank, port)
        ranks[pid] = rank
    codes, groups = {}, list(ranks)
    deadline = time.monotonic() + job["timeout"]
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in ranks:
            code = os.waitstatus_to_exitcode(status)
            codes[ranks.pop(pid)] = code
        elif pid:
            orphans.append(os.waitstatus_to_exitcode(status))
        elif time.monotonic() > deadline:
            deadline += 10
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
        else:
            time.sleep(0.01)
        if any(codes.values()):  # ranks that wait for a failed one would wait for minutes
            deadline = min(deadline, time.monotonic() + 5)
    deadline = time.monotonic() + 60
    while (left := members(groups)) and time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                orphans.append(os.waitstatus_to_exitcode(ended[1]))
        time.sleep(0.01)
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    return {"exit_codes": [codes[rank] for rank in sorted(codes)], "orphans": orphans, "left": left}


def serve(connection, own):
    """Run the jobs of one connection in its environment and ``own``; never returns."""
    # What ranks leave becomes a child of this process, which sees how it ends.
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    with connection, connection.makefile("rw") as stream:
        environment = json.loads(stream.readline())
        os.environ.clear()
        os.environ.update(environment | own)
        for line in stream:
            if line == "end\n":
                break
            print(json.dumps(run_job(json.loads(line))), file=stream, flush=True)
    os._exit(0)


def main():
    before = dict(os.environ)
    with contextlib.redirect_stdout(sys.stderr):
        warm_up()
    own = {name: value for name, value in os.environ.items() if before.get(name) != value}
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind("")  # Linux chooses a name that is free
        listener.listen()
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        print(listener.getsockname().decode().removeprefix("\0"), flush=True)
        while sys.stdin not in [key.fileobj for key, _ in selector.select()]:
            connection, _ = listener.accept()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if os.fork() == 0:
                listener.close()
                serve(connection, own)
            connection.close()


if __name__ == "__main__":
    main()
