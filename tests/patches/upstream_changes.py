"""Finds, in source code, what changes attributes of Megatron's or torch's modules, classes and objects.

It follows names, not values: what is imported from them, what is assigned from that or looped over, and
parameters that are annotated with it. An attribute of an object that came from elsewhere is found by its
name, if it is one that is known to be changed, or computed.
"""

import ast
from typing import NamedTuple

UPSTREAM = {"megatron", "torch", "transformer_engine"}
# Objects that hold command-line arguments, or a copy of a configuration: their attributes may be set by
# computed names.
ARGUMENTS = {"args", "alone", "changed"}


class Change(NamedTuple):
    """A line that changes something upstream.

    Attributes
    ----------
    line
        Its number.
    function
        The function or class of the module in which it stands, "" if in none.
    attribute
        What it changes; "" if that is computed.
    """

    line: int
    function: str
    attribute: str


def changes(source, known=frozenset()):
    """Return the changes in ``source``; ``known`` are attributes that nobody else's objects have."""
    tree = ast.parse(source)
    names = _upstream_names(tree)
    owner = {
        id(node): getattr(statement, "name", "") for statement in tree.body for node in ast.walk(statement)
    }
    return [
        Change(node.lineno, owner[id(node)], attribute)
        for node in ast.walk(tree)
        for target, attribute in _targets(node)
        if _root(target) in names
        or attribute in known
        or _is_module_table(target)
        or (attribute == "" and _root(target) not in ARGUMENTS)
    ]


def _upstream_names(tree):
    """Return the names that stand for something of Megatron's or torch's anywhere in a module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                (alias.asname or alias.name).split(".")[0]
                for alias in node.names
                if alias.name.split(".")[0] in UPSTREAM
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UPSTREAM:
            names |= {alias.asname or alias.name for alias in node.names}
    before = None
    while before != names:  # an alias may have aliases
        before = set(names)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and _stands_for(node.value, names):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
                if isinstance(node.target, ast.Name) and _stands_for(node.value, names):
                    names.add(node.target.id)
            elif isinstance(node, ast.For | ast.comprehension) and _stands_for(node.iter, names):
                names |= {name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)}
            elif isinstance(node, ast.arg) and any(_root(part) in names for part in _types(node.annotation)):
                names.add(node.arg)
    return names


def _types(annotation):
    """Return the alternatives of an annotation."""
    if isinstance(annotation, ast.BinOp):
        return [*_types(annotation.left), *_types(annotation.right)]
    return [annotation]


def _stands_for(value, names):
    """Tell whether a value is one of ``names``, or an attribute of one; or a tuple of such, or a module."""
    if isinstance(value, ast.Tuple | ast.List):
        return any(_stands_for(element, names) for element in value.elts)
    if isinstance(value, ast.Subscript):
        return _is_module_table(value)
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).endswith("import_module")
    return _root(value) in names


def _root(node):
    """Return ``a`` of ``a.b.c``, None of anything else."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _is_module_table(node):
    return isinstance(node, ast.Subscript) and ast.unparse(node.value) == "sys.modules"


def _targets(node):
    """Yield the objects that a statement or a call changes, each with the attribute."""
    if isinstance(node, ast.Assign | ast.Delete):
        targets = list(node.targets)
    elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For):
        targets = [node.target]
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        targets = [node.optional_vars]
    else:
        targets = []
    for target in targets:
        if isinstance(target, ast.Tuple | ast.List):
            targets += target.elts
        elif isinstance(target, ast.Attribute):
            yield target.value, target.attr
        elif _is_module_table(target):
            yield target, ""
        elif isinstance(target, ast.Subscript) and (owner := _owner(target.value)) is not None:
            yield owner, _constant(target.slice)
    if isinstance(node, ast.Call) and node.args:
        called = ast.unparse(node.func)
        # setattr(x, "name", ...), delattr, object.__setattr__, monkeypatch.setattr, mock.patch.object
        if called.endswith(("setattr", "delattr", "__setattr__", "patch.object")):
            yield node.args[0], _constant(node.args[1]) if len(node.args) > 1 else ""
        elif called.endswith("partial") and ast.unparse(node.args[0]) == "setattr":
            yield node.args[1], _constant(node.args[2])


def _owner(dictionary):
    """Return ``x`` of ``vars(x)`` and ``x.__dict__``, None of anything else."""
    if isinstance(dictionary, ast.Call) and ast.unparse(dictionary.func) == "vars" and dictionary.args:
        return dictionary.args[0]
    if isinstance(dictionary, ast.Attribute) and dictionary.attr == "__dict__":
        return dictionary.value
    return None


def _constant(node):
    return node.value if isinstance(node, ast.Constant) else ""
