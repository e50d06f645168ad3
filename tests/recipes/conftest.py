"""Recipes are run by one server of ranks, on inputs that are made once."""

import pytest

from tests.parallel.conftest import indexed_bytes, jobs  # noqa: F401
from tests.recipes.running import RecipeRunner


@pytest.fixture(scope="session")
def runner(jobs):  # noqa: F811
    return RecipeRunner(jobs)
