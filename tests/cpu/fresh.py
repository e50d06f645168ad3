"""Calls functions in new processes where the CPU stands in for the GPU and nothing else is changed.

They are forked from one process that has imported torch and Megatron, not from the test's.
"""

import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
PRELOADED = ["tests.cpu.preload"]


class CallError(Exception):
    """What the function raised, as ``Type: message``."""


def call(function, *arguments):
    """Return ``function(*arguments)``, called in a process of its own.

    ``function`` is a module's, and returns what can be pickled.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):
        forkserver.ensure_running()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        returned, raised = receiver.recv()
    finally:
        process.join()
    if raised is not None:
        raise CallError(raised)
    return returned


def _answer(connection, function, arguments):
    try:
        answer = (function(*arguments), None)
    except BaseException as error:
        answer = (None, f"{type(error).__name__}: {error}")
    connection.send(answer)
