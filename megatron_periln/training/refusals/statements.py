"""The statements by which Megatron refuses: what each reads, and the flags that say it."""

from __future__ import annotations

import argparse
import ast
import functools
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron.training.arguments import add_megatron_arguments

__all__ = ["Statement", "flags_of", "names_at", "names_in", "refusing_statements", "statement_at"]

# Of a configuration, and the arguments that it takes them from where they have another name.
_ARGUMENTS = {
    "fp8_param": "fp8_param_gather",
    "fp4_param": "fp4_param_gather",
    "num_moe_experts": "num_experts",
    "bias_activation_fusion": "bias_swiglu_fusion",
    "persist_layer_norm": "no_persist_layer_norm",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
    "grad_reduce_in_fp32": "accumulate_allreduce_grads_in_fp32",
    "average_in_collective": "ddp_average_in_collective",
    "check_for_nan_in_grad": "check_for_nan_in_loss_and_grad",
}


@dataclass(frozen=True)
class Statement:
    """An ``assert``, or a ``raise`` and the condition above it.

    Attributes
    ----------
    kind
        ``"assert"`` or ``"raise"``.
    lines
        Where it is in its file, from 1 on.
    condition
        What an ``assert`` asserts, or the condition under which it is raised, as source; "" for none.
    names
        What these conditions read.
    """

    kind: str
    lines: range
    condition: str
    names: frozenset[str]


def names_in(node: ast.AST) -> frozenset[str]:
    """Return the names and attributes that an expression reads."""
    return frozenset(
        inner.attr if isinstance(inner, ast.Attribute) else inner.id
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute | ast.Name)
    )


def refusing_statements(tree: ast.AST, above: ast.expr | None = None) -> list[tuple[ast.stmt, Statement]]:
    """Return each ``assert`` and ``raise`` of a tree; ``above`` is the nearest condition around it."""
    found: list[tuple[ast.stmt, Statement]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Assert | ast.Raise):
            assert node.end_lineno is not None
            lines = range(node.lineno, node.end_lineno + 1)
            around = names_in(above) if above is not None else frozenset()
            if isinstance(node, ast.Assert):
                condition, names = ast.unparse(node.test), names_in(node.test) | around
                found.append((node, Statement("assert", lines, condition, names)))
            else:
                condition = ast.unparse(above) if above is not None else ""
                found.append((node, Statement("raise", lines, condition, around)))
        inner = node.test if isinstance(node, ast.If) else above
        inner = None if isinstance(node, ast.FunctionDef | ast.ClassDef) else inner
        found += refusing_statements(node, inner)
    return found


@functools.cache
def _tree(path: str) -> ast.AST | None:
    try:
        return ast.parse(Path(path).read_text())
    except (OSError, SyntaxError, ValueError):
        return None


@functools.cache
def _statements(path: str) -> tuple[Statement, ...]:
    tree = _tree(path)
    return tuple(statement for _, statement in refusing_statements(tree)) if tree else ()


def statement_at(path: str, line: int) -> Statement | None:
    """Return the ``assert`` or ``raise`` that a line of a file is in, None if it is in none."""
    around = [statement for statement in _statements(path) if line in statement.lines]
    return min(around, key=lambda statement: len(statement.lines), default=None)


def names_at(path: str, line: int) -> frozenset[str]:
    """Return what the statement that a line is in reads, and the nearest condition around it."""
    if (tree := _tree(path)) is None:
        return frozenset()
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    around.sort(key=lambda node: (node.end_lineno or node.lineno) - node.lineno)
    conditions = [node.test for node in around if isinstance(node, ast.If)]
    return frozenset[str]().union(*map(names_in, [*around[:1], *conditions[:1]]))


@functools.cache
def _options() -> dict[str, list[str]]:
    """Return Megatron's options by the names of their arguments: half a second, after an error alone."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_megatron_arguments(parser)
    options: dict[str, list[str]] = {}
    for action in parser._actions:
        options.setdefault(action.dest, []).extend(action.option_strings)
    return options


def flags_of(names: Iterable[str], text: str = "", *, given: bool = False) -> list[str]:
    """Return the flags on the command line that say what is read; the first for each name if none does.

    Parameters
    ----------
    names
        What was read.
    text
        What Megatron says of it, which may name more of them.
    given
        Return only what is on the command line.
    """
    options = _options()
    read = {_ARGUMENTS.get(name, name) for name in (*names, *re.findall(r"\b[a-z0-9]+_[a-z0-9_]+\b", text))}
    said = set(re.findall(r"--[\w-]+", text))
    flags = [flag for name in sorted(read) for flag in options.get(name, ())]
    flags += sorted(said & {flag for each in options.values() for flag in each} - set(flags))
    words = {word.partition("=")[0] for word in sys.argv[1:]}
    chosen = [flag for flag in flags if flag in words]
    if chosen or given:
        return chosen
    return [options[name][0] for name in sorted(read) if options.get(name)]
