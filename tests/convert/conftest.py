import functools
import json

import pytest

from megatron_periln.convert.export import ExportOptions, export
from tests.convert import checkpoints
from tests.convert.cases import CASES
from tests.parallel.conftest import indexed_bytes, jobs  # noqa: F401


@pytest.fixture(scope="session")
def saved(single_process, tmp_path_factory):
    """Return the checkpoint of a case, saved when first asked for."""

    @functools.cache
    def of(name):
        return checkpoints.save(tmp_path_factory.mktemp("checkpoint"), CASES[name].flags)

    return of


@pytest.fixture(scope="session")
def exported(saved, tmp_path_factory):
    """Return the folder of a case's export, and the lines it said."""

    @functools.cache
    def of(name):
        said = []
        folder = tmp_path_factory.mktemp("exported") / "model"
        export(saved(name).folder, folder, ExportOptions(target=CASES[name].asked), say=said.append)
        return folder, said

    return of


@pytest.fixture
def config_of():
    """Return what the config.json in a folder holds."""
    return lambda folder: json.loads((folder / "config.json").read_text())
