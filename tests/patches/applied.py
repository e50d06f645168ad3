"""Calls checks in processes of their own, where nothing but what they apply has been fixed."""

from megatron_periln.patches import fixes
from tests.cpu import fresh


def without_fixes(check, *arguments):
    return fresh.call(check, *arguments)


def with_fixes(names, check, *arguments):
    return fresh.call(_fix_and_check, names, check, arguments)


def _fix_and_check(names, check, arguments):
    by_name = {fix.__name__: fix for fix in fixes.FIXES}
    for name in names:
        by_name[name]()
    return check(*arguments)
