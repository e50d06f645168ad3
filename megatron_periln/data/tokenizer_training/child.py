"""One call in a process of its own, so that Ctrl-C and a lack of memory end it and not its caller."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from megatron_periln.errors import PreprocessError

__all__ = ["in_child"]


def in_child[Result](function: Callable[..., Result], *args: Any, **options: Any) -> Result:
    """Return what ``function``, which must be importable, returns in a new process.

    Libraries of C++ and Rust see no signal until they return; a process can be ended at once. It is not
    forked, as SentencePiece's threads would be missing in it.

    Raises
    ------
    Exception
        What the function raised.
    PreprocessError
        If the process was killed.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import _serve; _serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,  # Ctrl-C goes to this process, which ends the other
    )
    assert process.stdin and process.stdout
    try:
        pickle.dump((function, args, options), process.stdin)
        process.stdin.close()
        result, error = pickle.load(process.stdout)
    except (BrokenPipeError, EOFError, pickle.UnpicklingError):
        raise PreprocessError(
            f"{function.__name__} ended with {_end(process.wait())}: most likely the memory was too small; "
            f"use a smaller --sample-bytes"
        ) from None
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    if error is not None:
        raise error
    return result


def _end(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _serve() -> None:
    """Read a call from stdin, and write to stdout what came of it."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get into the answer
    function, args, options = pickle.load(sys.stdin.buffer)
    try:
        outcome: tuple[Any, Exception | None] = (function(*args, **options), None)
    except Exception as error:
        outcome = (None, error)
    with answer:
        pickle.dump(outcome, answer)
