"""Calls checks in processes of their own, where nothing but what they apply has been fixed."""

from megatron_periln.patches import layers, optimizers
from tests.cpu import fresh


def without_fixes(check, *arguments):
    return fresh.call(check, *arguments)


def with_fixes(names, check, *arguments):
    return fresh.call(_fix_and_check, names, check, arguments)


def _fix_and_check(names, check, arguments):
    for name in names:
        fix = getattr(layers, name, None) or getattr(optimizers, name)
        fix()
    return check(*arguments)
