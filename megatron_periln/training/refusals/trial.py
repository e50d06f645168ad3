"""All that Megatron's validation and configurations refuse, found on a copy of the arguments.

Megatron stops at the first thing that it refuses. Where it does, its functions are run once more on another
copy with each ``assert`` and ``raise`` in them turned into a note, so that the rest of them is reached.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import inspect
import io
import logging
import textwrap
import types
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.training.arguments import validate_args
from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config

from megatron_periln.models.from_arguments import transformer_config
from megatron_periln.training.refusals.one_line import in_words, why_refused
from megatron_periln.training.refusals.statements import Statement, refusing_statements

__all__ = ["Refusal", "Trial", "go_on", "try_validation"]

_CONFIGURATIONS = (
    ModelParallelConfig,
    TransformerConfig,
    MLATransformerConfig,
    OptimizerConfig,
    DistributedDataParallelConfig,
)
_BUILDERS = (transformer_config, get_megatron_optimizer_config, get_megatron_ddp_config)
_NOTE, _OWN_CLASS = "__note__", "__class__"


@dataclass(frozen=True)
class Refusal:
    """One thing that is refused.

    Attributes
    ----------
    text
        What, in one line.
    names
        What its condition reads.
    """

    text: str
    names: frozenset[str] = frozenset()


@dataclass
class Trial:
    """What came of trying.

    Attributes
    ----------
    args
        A copy of the arguments, validated; None if they can't be.
    refusals
        What is refused.
    error
        The error at which Megatron stops.
    """

    args: Namespace | None
    refusals: list[Refusal] = field(default_factory=list)
    error: Exception | None = None


def try_validation(args: Namespace) -> Trial:
    """Validate a copy of ``args``, and build the configurations of the model and the optimizer from it.

    Parameters
    ----------
    args
        Megatron's, parsed. An error that is no refusal is left to what meets it in earnest.
    """
    with _in_silence():
        tried = _copy(args)
        try:
            validate_args(tried)
        except (Exception, SystemExit) as error:
            cause = error if isinstance(error, Exception) else None
            return Trial(None, _all_refusals(args), cause)
        for build in _BUILDERS:
            try:
                build(tried)
            except Exception as error:
                return Trial(tried, _all_refusals(args), error)
        return Trial(tried)


def _copy(args: Namespace) -> Namespace:
    """Return a deep copy, which shares what can't be changed: almost all of some 1,500 values."""
    fixed = (str, int, float, bool, type(None))
    return Namespace(
        **{
            name: value if isinstance(value, fixed) else copy.deepcopy(value)
            for name, value in vars(args).items()
        }
    )


def _all_refusals(args: Namespace) -> list[Refusal]:
    tried = _copy(args)
    notes = _Notes()
    with contextlib.ExitStack() as stack:
        for cls in _CONFIGURATIONS:
            if "__post_init__" in vars(cls):
                going_on = go_on(cls.__post_init__, notes.add, owner=cls)
                stack.enter_context(mock.patch.object(cls, "__post_init__", going_on))
        if not notes.end(go_on(validate_args, notes.add), tried):
            return notes.refusals
        for build in _BUILDERS:
            notes.seen |= notes.names
            notes.end(build, tried)
    return notes.refusals


class _Notes:
    """Gathers what is refused; what reads nothing but what is refused already is taken for the same."""

    def __init__(self) -> None:
        self.refusals: list[Refusal] = []
        self.names: set[str] = set()
        self.seen: set[str] = set()
        self._statements: set[tuple[str, int]] = set()

    def add(self, error: Exception, statement: Statement, path: str) -> None:
        place = (path, statement.lines.start)
        if place in self._statements or (statement.names and statement.names <= self.seen):
            return
        self._statements.add(place)
        self.names |= statement.names
        text = in_words(error, statement, path, statement.lines.start)
        self.refusals.append(Refusal(text, statement.names))

    def end(self, function: Callable[..., object], args: Namespace) -> bool:
        """Run ``function`` to its end, and tell whether it has one; a refusal that ends it is noted."""
        try:
            function(args)
        except (Exception, SystemExit) as error:
            reason = why_refused(error) if isinstance(error, Exception) else None
            if reason is not None and not self.refusals:  # after another, it may come of that
                self.refusals.append(Refusal(reason))
            return False
        return True


def go_on(
    function: Callable[..., Any], note: Callable[[Exception, Statement, str], None], owner: type | None = None
) -> Callable[..., Any]:
    """Return ``function`` with its refusals noted instead of raised.

    Parameters
    ----------
    function
        A function of a module, or a method that uses nothing of its surroundings but ``super()``.
    note
        Gets the error, its statement and the file.
    owner
        The class of the method.
    """
    code, statements, path = _rewritten(function)
    space = {
        **function.__globals__,
        _NOTE: lambda error, index: note(
            error() if isinstance(error, type) else error, statements[index], path
        ),
    }
    exec(code, space)
    made: types.FunctionType = space["around"](owner)
    return made


@functools.cache
def _rewritten(function: Callable[..., Any]) -> tuple[types.CodeType, list[Statement], str]:
    """Return code that defines `go_on`'s function in another around it, its refusing statements, its file."""
    lines, first = inspect.getsourcelines(function)
    path = inspect.getsourcefile(function) or ""
    module = ast.parse(textwrap.dedent("".join(lines)))
    ast.increment_lineno(module, first - 1)
    statements = {id(node): statement for node, statement in refusing_statements(module)}
    module = ast.fix_missing_locations(_GoingOn(statements).visit(module))
    # What a method's ``super()`` is the super of, as a variable of a function around it.
    around = ast.parse(f"def around({_OWN_CLASS}):\n    return {function.__name__}")
    (outer,) = around.body
    assert isinstance(outer, ast.FunctionDef)
    outer.body[:0] = module.body
    code = compile(ast.fix_missing_locations(around), path, "exec")
    return code, list(statements.values()), path


class _GoingOn(ast.NodeTransformer):
    """Turns refusing statements into calls of `_NOTE`, with the error and the number of the statement."""

    def __init__(self, statements: dict[int, Statement]) -> None:
        self._numbers = {node: number for number, node in enumerate(statements)}

    def _note(self, node: ast.stmt, error: ast.expr) -> ast.stmt:
        call = ast.Call(
            ast.Name(_NOTE, ast.Load()), [error, ast.Constant(self._numbers[id(node)])], keywords=[]
        )
        return ast.copy_location(ast.Expr(call), node)

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        error = ast.Call(ast.Name("AssertionError", ast.Load()), [node.msg] if node.msg else [], keywords=[])
        condition = ast.UnaryOp(ast.Not(), node.test)
        return ast.copy_location(ast.If(condition, [self._note(node, error)], []), node)

    def visit_Raise(self, node: ast.Raise) -> ast.stmt:
        return node if node.exc is None else self._note(node, node.exc)


@contextlib.contextmanager
def _in_silence() -> Iterator[None]:
    disabled = logging.root.manager.disable
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable()
        try:
            yield
        finally:
            logging.disable(disabled)
