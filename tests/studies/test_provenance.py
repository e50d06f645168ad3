"""The commit that is written beside results is this package's, not that of a repository around it."""

import subprocess

import pytest

from megatron_periln.studies import provenance


@pytest.fixture
def repository(tmp_path):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "--quiet"], [*identity, "commit", "--quiet", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_the_repository_is_that_of_the_package_or_none(repository, monkeypatch):
    for folder, found in ((repository, True), (repository / "lib" / "site-packages", False)):
        file = folder / "megatron_periln" / "studies" / "provenance.py"
        file.parent.mkdir(parents=True)
        monkeypatch.setattr(provenance, "__file__", str(file))
        assert (provenance.commit() is not None) == found
