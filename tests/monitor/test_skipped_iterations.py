"""Records of runs whose first iterations Megatron skips: they begin where training does."""

from megatron_periln.monitor.reading import read_run
from megatron_periln.monitor.record import RunRecord
from tests.monitor.records import HEADER, iterations, write
from tests.parallel.conftest import indexed_bytes, jobs  # noqa: F401
from tests.training.model import MODEL


def test_a_new_run_keeps_the_earlier_one_aside_and_a_resumed_one_drops_what_it_skips(jobs, tmp_path):  # noqa: F811
    path = tmp_path / "monitor.jsonl"
    write(RunRecord.open(path, HEADER, 0), 1, 4)
    flags = f"{MODEL} --norm-placement peri --monitor-layers all --save-interval 3 --save {tmp_path}"
    jobs.run("skipped", f"{flags} --iterations-to-skip 1 2")
    assert iterations(tmp_path / "monitor.1.jsonl") == [1, 2, 3, 4]
    assert (iterations(path, "run"), iterations(path)) == ([0], [3, 4, 5, 6])
    jobs.run("skipped-resumed", f"{flags} --iterations-to-skip 4 5 --load {tmp_path} --ckpt-step 3")
    assert (read_run(path).resumed_from, iterations(path)) == ([3], [3, 6])
