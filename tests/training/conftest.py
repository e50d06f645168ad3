"""Jobs of six iterations on a model of two layers."""

import functools
import re

import pytest

from tests.parallel.conftest import indexed_bytes, jobs  # noqa: F401
from tests.training.model import MODEL


@pytest.fixture(scope="session")
def trained(jobs):  # noqa: F811
    """Return the finished training with a norm placement, which runs when first asked for."""

    @functools.cache
    def train(placement):
        folder = jobs.folder / f"trained-{placement}" / "tensorboard"
        watched = f"--eval-interval 3 --tensorboard-dir {folder} --tensorboard-log-interval 1"
        return jobs.run(f"trained-{placement}", f"{MODEL} --norm-placement {placement} {watched}")

    return train


@pytest.fixture(scope="session")
def stock(jobs):  # noqa: F811
    """The finished training of Megatron's own model, none of our arguments in its checkpoint."""
    return jobs.run("stock", f"{MODEL} --eval-interval 3", changes=["tests.training.stock.use_stock_model"])


@pytest.fixture(scope="session")
def refused(jobs):  # noqa: F811
    """Run a job that is refused before anything is trained; return its error, one line, or one and a list."""

    def run(name, arguments, model=MODEL, **options):
        job = jobs.run(f"refused-{name}", f"{model} {arguments}", succeeds=False, **options)
        logs = [path.read_text() for path in sorted(job.folder.glob("rank*.log"))]
        assert set(job.exit_codes) == {1}, job.log
        assert "Traceback" not in job.log, job.log
        assert not (job.folder / "curve.json").exists()
        assert not (job.folder / "checkpoints").exists()
        first, *others = [
            re.findall(r"^error:.*(?:\n  .*)*", log, flags=re.MULTILINE) for log in map(str.rstrip, logs)
        ]
        assert logs[0].rstrip().endswith(first[0])
        assert len(first) == 1
        assert not any(others)
        return first[0]

    return run
