"""Jobs whose checkpoints meet with an accident."""

from tests.parallel.conftest import indexed_bytes, jobs  # noqa: F401
