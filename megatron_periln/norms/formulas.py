"""Numbers that go by a sublayer's place in a model, as data: a number, a formula or a list.

A formula is text such as ``sqrt(k / (k + 1))``, of numbers, ``+ - * / **``, comparisons, ``sqrt`` and the
names of `Place.names`. A comparison is 1 where it holds and 0 where it doesn't.
"""

from __future__ import annotations

import ast
import math
import operator
from dataclasses import dataclass
from typing import Any

__all__ = ["Place", "Value", "check", "evaluate", "names_a_place"]

Value = bool | float | str | tuple[float, ...]
"""A number everywhere, a formula, or numbers: one a layer, or one a sublayer."""

_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


@dataclass(frozen=True)
class Place:
    """Where a sublayer is: layers and sublayers are counted from 1, over all pipeline stages.

    Attributes
    ----------
    sublayer, sublayers
        Which it is, and how many the model has.
    attention
        Whether it mixes tokens, as attention and Mamba do; else it is an MLP or a mixture of experts.
    """

    sublayer: int
    sublayers: int
    attention: bool

    @staticmethod
    def of_layer(number: int, num_layers: int, attention: bool, hybrid: bool = False) -> Place:
        """Return a place of Megatron's layer ``number``; in a ``hybrid`` model each is one sublayer."""
        if hybrid:
            return Place(number, num_layers, attention)
        return Place(2 * number - attention, 2 * num_layers, attention)

    @property
    def names(self) -> dict[str, float]:
        """What a formula may name: ``l`` of ``L`` layers, ``k`` of ``K`` sublayers; of which kind it is."""
        return {
            "l": (self.sublayer + 1) // 2,
            "L": self.sublayers / 2,
            "k": self.sublayer,
            "K": self.sublayers,
            "attention": self.attention,
            "mlp": not self.attention,
        }


def evaluate(value: Value, place: Place) -> float:
    """Return the number that ``value`` is at ``place``.

    Raises
    ------
    ValueError
        If there is none, or none that is finite.
    """
    if isinstance(value, tuple):
        return _listed(value, place)
    if not isinstance(value, str):
        return float(value)
    try:
        number = float(_compute(ast.parse(value, mode="eval").body, place.names))
    except (ArithmeticError, TypeError) as error:  # a root of a negative number is complex
        raise ValueError(f"{value!r} has no value at sublayer {place.sublayer}: {error}") from error
    except SyntaxError as error:
        raise ValueError(f"{value!r} is no number and no formula") from error
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is {number} at sublayer {place.sublayer}")
    return number


def names_a_place(formula: str) -> bool:
    """Tell whether a formula goes by more than how many layers a model has."""
    names = {node.id for node in ast.walk(ast.parse(formula, mode="eval")) if isinstance(node, ast.Name)}
    return bool(names - {"L", "K", "sqrt"})


def check(value: Value) -> None:
    """Raise a ValueError if ``value`` is no number, formula or list of numbers, whatever the model."""
    if isinstance(value, tuple):
        if not value or not all(isinstance(item, float | int) and _is_finite(item) for item in value):
            raise ValueError(f"{list(value)} is no list of numbers, one a layer or one a sublayer")
    elif isinstance(value, str):
        # In the middle of a model: what is undefined at its ends is found when that is known.
        evaluate(value, Place(3, 8, attention=True))
    elif not _is_finite(value):
        raise ValueError(f"{value} is not finite")


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond all floats
        return False


def _listed(values: tuple[float, ...], place: Place) -> float:
    if len(values) == place.sublayers:
        return float(values[place.sublayer - 1])
    if 2 * len(values) == place.sublayers:
        return float(values[(place.sublayer - 1) // 2])
    layers = place.sublayers / 2
    raise ValueError(
        f"a list of {len(values)} numbers is neither one for each of {layers:g} layers nor of "
        f"{place.sublayers} sublayers"
    )


def _compute(node: ast.AST, names: dict[str, float]) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() as number):
            return float(number)
        case ast.Name(id=name) if name in names:
            return float(names[name])
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_compute(operand, names)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_compute(left, names), _compute(right, names))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_compute(left, names), _compute(right, names))
        case ast.Call(func=ast.Name(id="sqrt"), args=[argument], keywords=[]):
            return _compute(argument, names) ** 0.5
    raise ValueError(
        f"{ast.unparse(node)!r} is no part of a formula: those are numbers, {', '.join(names)}, sqrt(...), "
        "+ - * / ** and comparisons"
    )
