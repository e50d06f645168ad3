import functools
from dataclasses import dataclass

import pytest
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_periln.models.specs import substitute, with_submodules


class Old: ...


class New: ...


class Other: ...


@dataclass
class Parts:
    first: object = None
    second: object = None


TABLE = {Old: New}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Old, New),
        (Other, Other),
        (None, None),
        ([Old, Other], [New, Other]),
        (Parts(Old, [Other, Parts(Old)]), Parts(New, [Other, Parts(New)])),
        (ModuleSpec(Old, {"size": 3}, Parts(Old)), ModuleSpec(New, {"size": 3}, Parts(New))),
        (ModuleSpec(Other, submodules=Parts(Old)), ModuleSpec(Other, submodules=Parts(New))),
    ],
    ids=["class", "other", "none", "list", "dataclass", "module-spec", "submodules-only"],
)
def test_every_module_in_the_table_is_replaced(spec, expected):
    assert substitute(spec, TABLE) == expected


def test_submodules_of_a_partial_are_replaced():
    spec = functools.partial(Other, 1, submodules=Parts(Old), size=3)
    found = substitute(spec, TABLE)
    assert (found.func, found.args) == (Other, (1,))
    assert found.keywords == {"submodules": Parts(New), "size": 3}
    assert spec.keywords["submodules"] == Parts(Old)


def test_a_partial_without_submodules_stays():
    spec = functools.partial(Other, size=3)
    assert substitute(spec, TABLE) is spec


def test_originals_stay_as_they_are():
    inner = ModuleSpec(Old, submodules=Parts(Old))
    outer = ModuleSpec(Other, submodules=Parts(inner, [Old]))
    substitute(outer, TABLE)
    assert inner.module is Old and inner.submodules == Parts(Old)
    assert outer.submodules.first is inner and outer.submodules.second == [Old]


@pytest.mark.parametrize(
    "spec",
    [ModuleSpec(Other, {"size": 3}, Parts(Old)), functools.partial(Other, submodules=Parts(Old), size=3)],
    ids=["module-spec", "partial"],
)
def test_other_submodules_go_into_a_copy(spec):
    changed = with_submodules(spec, Parts(New))
    for given, first in ((spec, Old), (changed, New)):
        submodules = given.submodules if isinstance(given, ModuleSpec) else given.keywords["submodules"]
        assert submodules == Parts(first)
