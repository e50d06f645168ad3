"""A process that encodes samples again with the reference, which it loads while others get ready.

One for all workers, and none of them knows of it: the first process has their samples from their reports,
asks one question at a time, and places no chunk before its answer. Whatever happens to a worker, the checker
never waits for it. One that dies is replaced, and asked again; only where no process can be started does the
first one, which nobody replaces, load the reference and check by itself.
One keeps up with 90 workers: they encode 110 MB/s each, of which it gets 1/4096, and libraries 2.6 or more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from megatron_periln.data.preprocess.encode import Sample
from megatron_periln.data.preprocess.processes import cause_of_death, fork
from megatron_periln.data.preprocess.rare_texts import FOR_ALL_WORKERS
from megatron_periln.data.tokenizers.encoders import BatchEncoder, Encoded, difference_between
from megatron_periln.errors import PreprocessError, with_kind

__all__ = ["Check", "Checker", "InexactEncoderError"]

_DEATHS = 3
"""Checkers that die one after the other without an answer, after which the run ends."""


class InexactEncoderError(Exception):
    """The encoder does not do what its reference does."""


@dataclass(eq=False)
class Check:
    """A question about a chunk's samples.

    Parameters
    ----------
    done
        Whether the answer is there.
    difference
        The answer: where the reference gives something else; None if nowhere.
    """

    done: bool = False
    difference: str | None = None

    def answer(self, difference: str | None) -> None:
        """Note the answer."""
        self.done, self.difference = True, difference

    def result(self) -> None:
        """Return if all is right.

        Raises
        ------
        InexactEncoderError
            If the reference gives something else.
        """
        assert self.done
        if self.difference:
            raise InexactEncoderError(self.difference)


@dataclass(frozen=True)
class _Question:
    """Samples to be checked, or texts to be encoded; None is answered when the reference is loaded."""

    content: Any
    is_check: bool
    answer: Callable[[Any], None]


class Checker:
    """The first process's side.

    Attributes
    ----------
    warn
        Is told that a process has died, that none could be started, or that nothing can be checked.
    others
        Returns this process's ends of other pipes, which the checker must not keep open.
    """

    def __init__(self) -> None:
        self.warn: Callable[[str], None] = lambda message: None
        self.others: Callable[[], list[Connection]] = list
        self._reference: BatchEncoder | None = None
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._problem: str | None = None
        self._waiting: deque[_Question] = deque()
        """Those that are not answered; the first has been asked."""
        self._deaths = 0
        self._left = FOR_ALL_WORKERS

    def use(self, reference: BatchEncoder | None) -> None:
        """Have a process that loads ``reference``; none without one. A process that there is goes on."""
        if reference is None:
            self.close()
        elif self._process is None:
            self._reference = reference
            self._start()

    def _start(self) -> None:
        try:
            self._process, self._connection = fork(_serve, self._reference, inherited=self.others())
        except OSError as error:
            self._problem = f"cannot be started: {error.strerror}"
        else:
            self._waiting.appendleft(_Question(None, is_check=True, answer=self._take_problem))

    def _take_problem(self, problem: str | None) -> None:
        if problem:
            self.warn(f"a sample of the ids cannot be checked, as the tokenizer's library fails: {problem}")

    def close(self) -> None:
        """End the process; what was not answered never will be."""
        self._waiting.clear()
        if self._process and self._connection:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = self._connection = None

    @property
    def connections(self) -> list[Connection]:
        """The pipe, if there is one: a process that is forked now must not keep it open."""
        return [self._connection] if self._connection else []

    @property
    def answers(self) -> list[Connection]:
        """The pipe, if an answer will come by it, or the end of the process, to be received."""
        return self.connections if self._waiting else []

    def ask(self, samples: Sequence[Sample]) -> Check:
        """Ask about a chunk."""
        check = Check()
        if samples:
            self._add(_Question(samples, is_check=True, answer=check.answer))
        else:
            check.answer(None)
        return check

    def encode(self, texts: list[str], answer: Callable[[Encoded | None], None]) -> None:
        """Have a worker's texts encoded; it is answered None if it had better do so itself."""
        self._left -= sum(map(len, texts))
        if self._left < 0 or not self._connection:
            answer(None)
        else:
            self._add(_Question(texts, is_check=False, answer=answer))

    def _add(self, question: _Question) -> None:
        self._waiting.append(question)
        if len(self._waiting) == 1:
            self._ask_first()

    def receive(self) -> None:
        """Read the answer to the first question, and ask the next.

        Raises
        ------
        PreprocessError
            If one process after the other dies.
        """
        assert self._connection
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._replace()
        else:
            question = self._waiting.popleft()
            if question.content is not None:
                self._deaths = 0
            question.answer(answer)
            self._ask_first()

    def _ask_first(self) -> None:
        # One at a time: neither side can wait for the other to read what it sends.
        try:
            if self._waiting and self._connection:
                self._connection.send((self._waiting[0].is_check, self._waiting[0].content))
        except OSError:
            self._replace()
        else:
            if not self._connection:
                self._check_here()

    def _replace(self) -> None:
        """Start another process for one that died, which is asked first what the other did not answer."""
        assert self._process and self._connection
        self._connection.close()
        self._connection = None
        self._process.join()
        self._deaths += 1
        reason = f"the process that checks a sample of the ids {cause_of_death(self._process)}"
        if self._deaths >= _DEATHS:
            raise PreprocessError(f"{reason}, the last of {_DEATHS} without an answer")
        self.warn(f"{reason}; another does its work")
        if self._waiting and self._waiting[0].content is None:
            self._waiting.popleft()
        elif self._waiting and not self._waiting[0].is_check:  # a worker can do that, and may die of it
            self._waiting.popleft().answer(None)
        self._start()
        if not self._connection:
            self._check_here()

    def _check_here(self) -> None:
        """Check everything in this process; texts are for the workers who ask."""
        assert self._reference
        if self._problem:
            self.warn(f"the process that checks a sample of the ids {self._problem}; this one does it")
            self._problem = None
        while self._waiting:
            question = self._waiting.popleft()
            question.answer(_difference(self._reference, question.content) if question.is_check else None)


def _serve(connection: Connection, reference: BatchEncoder) -> None:
    """Load the reference and answer: the process's side."""
    problem = None
    try:
        reference.load()
    except BaseException as error:  # a panic in an encoder written in Rust is no Exception
        problem = with_kind(error)
    connection.send(problem)
    while True:
        is_check, content = connection.recv()
        connection.send((_difference if is_check else _encoded)(reference, content))


def _encoded(reference: BatchEncoder, texts: list[str]) -> Encoded | None:
    try:
        return reference.encode(texts)
    except BaseException:  # as below; the worker finds the same, and tells
        return None


def _difference(reference: BatchEncoder, samples: Sequence[Sample]) -> str | None:
    for encoder, texts, ids in samples:
        try:
            expected = reference.encode(texts)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic in an encoder written in Rust is no Exception
            continue  # with nothing to compare
        if found := difference_between(texts, (encoder, ids), (reference.name, expected)):
            return found
    return None
