"""The monitor's statistics in every parallel layout are those of one process, and training stays the same.

Errors are relative to one process's value. Jobs take a step from the same checkpoint; those of layouts whose
training is compared go on.
"""

import functools
import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_periln.monitor.lines import FILE_NAME
from megatron_periln.monitor.statistics import STATISTICS
from tests.parallel.cases import MONITORED_CASES, WATCHED, Case
from tests.parallel.compare import tensors_apart
from tests.parallel.conftest import FIRST, LAST
from tests.parallel.monitor_changes import COUNTS

CHANGES = "tests.parallel.monitor_changes"
TOLERANCE = 1e-5
MISTAKE = 1e-2  # every deliberate mistake below is wrong by more than this
TOKENS = 4 * 64  # a global batch

DISTRIBUTED = "distributed optimizer"


@pytest.fixture(scope="module")
def monitored(jobs, run):
    """Return ``(statistics, counts, step)`` of one iteration of a case, from one process's checkpoint."""

    @functools.cache
    def cached(case, mistake=None, extra=""):
        if case in WATCHED and not (mistake or extra):
            return read(run(case))
        load = run(case.one_process).folder / "checkpoints"
        arguments = (
            f"{case.model} {case.execution} --load {load} --ckpt-step {FIRST - 1} --no-load-rng "
            f"--monitor-layers all --monitor-interval {FIRST} --exit-interval {FIRST} --save-interval 1000 "
            f"{extra}"
        )
        name = f"monitored-{case}-{mistake}{extra}".replace(", ", "-").replace(" ", "_").replace("+", "")
        changes = [f"{CHANGES}.{change}" for change in ("keep_counts", mistake) if change]
        job = jobs.run(name, arguments, case.ranks, changes=changes)
        return read(job)

    return cached


def read(job):
    """Return the statistics of the first step, its counts, and its line, from a job's files."""
    first = [line for line in records(job) if line.get("iteration") == FIRST]
    (step,) = [line for line in first if line["kind"] == "step"]
    (layers,) = [line for line in first if line["kind"] == "layers"]
    (counts,) = [
        entry
        for entry in json.loads((job.folder / "checkpoints" / COUNTS).read_text())
        if entry["iteration"] == FIRST
    ]
    return {name: layers[name] for name in STATISTICS}, counts, step


def records(job):
    return [json.loads(line) for line in (job.folder / "checkpoints" / FILE_NAME).read_text().splitlines()]


def apart(mine, theirs):
    """Return the largest relative difference of each statistic; None must stand where None stands."""
    differences = {}
    for name in STATISTICS:
        pairs = list(zip(mine[name], theirs[name], strict=True))
        assert all((m is None) == (t is None) for m, t in pairs), name
        numbers = [(m, t) for m, t in pairs if t is not None]
        differences[name] = max((abs(m - t) / (abs(t) or 1.0) for m, t in numbers), default=0.0)
    return differences


@pytest.mark.parametrize("case", MONITORED_CASES, ids=str)
def test_a_layout_has_the_statistics_of_one_process(monitored, case):
    statistics, counts, step = monitored(case)
    one, one_counts, one_step = monitored(case.one_process)
    differences = apart(statistics, one)
    assert max(differences.values()) < TOLERANCE, differences
    assert counts["tokens"] == one_counts["tokens"]
    assert step["tokens"] == TOKENS and step["loss"] == pytest.approx(one_step["loss"], rel=TOLERANCE)
    assert counts["norm"] == pytest.approx(counts["grad_norm"], rel=TOLERANCE)
    assert counts["norm"] == pytest.approx(one_counts["norm"], rel=TOLERANCE)


@pytest.mark.parametrize("placement", ["pre", "post", "peri", "output"])
def test_each_token_counts_once(monitored, placement):
    _, counts, _ = monitored(Case(placement))
    final = 0 if placement == "post" else TOKENS
    layers = [0, *[TOKENS] * 4, 0]
    assert counts["tokens"] == {
        "stream": [*[TOKENS] * 5, final],
        **dict.fromkeys(("angle", "attention", "mlp"), layers),
    }


def test_per_token_loss_has_the_same_gradients(monitored):
    """All tokens count in these batches, so both losses are the same."""
    one, _, _ = monitored(Case("peri"))
    for case in (Case("peri", layout=layout) for layout in ("TP2+SP", "DP2", "CP2")):
        differences = apart(monitored(case, extra="--calculate-per-token-loss")[0], one)
        assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize(
    ("mistake", "case", "statistic"),
    [
        ("count_on_all_tensor_ranks", Case("peri", layout="TP2"), "stream_gradient_norm"),
        ("count_shared_parameters_on_all_tensor_ranks", Case("peri", layout="TP2"), "norm_gradient_norm"),
        ("count_all_of_each_bucket", Case("peri", layout="DP2", variant=DISTRIBUTED), "mlp_gradient_norm"),
        ("forget_the_data_parallel_size", Case("peri", layout="DP2"), "stream_gradient_norm"),
        ("forget_the_data_parallel_size", Case("peri", layout="CP2"), "stream_gradient_norm"),
    ],
    ids=str,
)
def test_a_mistake_is_noticed(monitored, mistake, case, statistic):
    assert apart(monitored(case, mistake)[0], monitored(case.one_process)[0])[statistic] > MISTAKE


def test_counting_recomputation_is_noticed(monitored):
    """Means don't show it, counts do."""
    case = Case("peri", options="full recompute")
    wrong, right = monitored(case, "count_recomputation")[1], monitored(case)[1]
    assert wrong["tokens"]["mlp"] == [2 * tokens for tokens in right["tokens"]["mlp"]]


@pytest.mark.parametrize(
    "case",
    [
        Case("peri"),
        Case("pre", layout="PP2xVPP2"),
        Case("post", layout="TP2+SP", options="full recompute"),
        Case("peri", layout="DP2", options="overlap", variant=DISTRIBUTED),
    ],
    ids=str,
)
def test_monitored_training_is_the_same_training(jobs, run, case):
    unlike = case in WATCHED or case == case.one_process  # monitored already, or from the first step
    plain = run(case, (f"{CHANGES}.forbid_the_monitor",)) if unlike else run(case)
    load = run(case.one_process).folder / "checkpoints"
    arguments = (
        f"{case.model} {case.execution} --save-wgrads-interval {FIRST} --eval-iters 0 --load {load} "
        f"--ckpt-step {FIRST - 1} --save-interval 1000 --no-load-rng "
        "--monitor-layers all --monitor-interval 2"
    )
    name = f"same-{case}".replace(", ", "-").replace(" ", "_").replace("+", "")
    job = jobs.run(name, arguments, case.ranks)
    assert job.curve == plain.curve
    assert max(tensors_apart(job.weights(LAST), plain.weights(LAST), relative=False).values()) == 0
    assert max(tensors_apart(job.gradients, plain.gradients, relative=False).values()) == 0
    lines = records(job)
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["iteration"] for line in steps] == list(range(FIRST, LAST + 1))
    layers = [line["iteration"] for line in lines if line["kind"] == "layers"]
    assert layers == list(range(FIRST + 1, LAST + 1, 2))
    curve = {point["iteration"]: point for point in job.curve}
    assert [line["loss"] for line in steps] == [curve[line["iteration"]]["lm loss"] for line in steps]
    assert [line["grad_norm"] for line in steps] == [curve[line["iteration"]]["grad norm"] for line in steps]


def test_the_monitor_is_not_there_unless_asked_for(jobs):
    forbid = [f"{CHANGES}.forbid_the_monitor"]
    flags = f"{Case('peri').model} --exit-interval 1 --save-interval 1000"
    jobs.run("no-monitor", flags, changes=forbid)
    job = jobs.run("monitor-forbidden", f"{flags} --monitor-layers all", changes=forbid, succeeds=False)
    assert "import of megatron_periln.monitor.install halted" in job.log


def test_a_run_resumes_its_record(jobs):
    model = f"{Case('peri').model} --monitor-layers all --monitor-interval 2 --save-interval 3"
    first = jobs.run("record", f"{model} --exit-interval 5")
    checkpoints = first.folder / "checkpoints"
    again = f"--load {checkpoints} --ckpt-step 3 --save {checkpoints} --exit-interval 7"
    jobs.run("record-resumed", f"{model} {again}", 2)
    lines = records(first)
    assert [line["iteration"] for line in lines if line["kind"] == "step"] == list(range(1, 8))
    assert [line["iteration"] for line in lines if line["kind"] == "layers"] == [1, 2, 4, 6]
    assert [line["iteration"] for line in lines if line["kind"] == "run"] == [0, 3]


def test_the_record_says_whose_it_is(run):
    job = run(Case("peri", "moe", "EP2", variant=DISTRIBUTED))
    header = records(job)[0]
    assert (header["placement"], header["num_layers"], header["hidden_size"]) == ("peri", 4, 64)
    weights = job.weights(LAST)
    own = [tensor for name, tensor in weights.items() if not name.startswith("optimizer")]
    assert header["parameters"] == sum(math.prod(tensor.shape) for tensor in own)
    assert header["flags"]["seed"] == 1234


def test_scalars_and_maps_go_to_tensorboard(jobs):
    folder = jobs.folder / "monitor-tensorboard"
    flags = f"{Case('peri').model} --tensorboard-dir {folder} --monitor-interval 2 --monitor-layers 1,2"
    job = jobs.run("tensorboard", f"{flags} --exit-interval 4 --save-interval 1000")
    events = EventAccumulator(str(folder)).Reload()
    layers = [line for line in records(job) if line["kind"] == "layers"]
    for index, layer in enumerate((1, 2)):
        scalars = events.Scalars(f"monitor-stream_variance/layer-{layer:03d}")
        assert [event.step for event in scalars] == [1, 2, 4]
        assert [event.value for event in scalars] == pytest.approx(
            [line["stream_variance"][index] for line in layers], rel=1e-6
        )
    images = events.Images("monitor/stream_variance")
    assert [(image.step, image.width, image.height) for image in images] == [
        (1, 8, 16),
        (2, 16, 16),
        (4, 24, 16),
    ]


@pytest.mark.parametrize("layout", ["1", "PP2"])
def test_a_run_stops_on_a_spike_with_a_checkpoint(jobs, layout):
    case = Case("peri", layout=layout)
    arguments = (
        f"{case.model} {case.execution} --save-interval 1000 --monitor-layers all --monitor-stop-on spike"
    )
    change = f"{CHANGES}.raise_a_spike_in_iteration_three"
    job = jobs.run(f"spike-{layout}", arguments, case.ranks, changes=[change])
    assert "monitor: iteration 3: a spike made by a test" in job.log
    assert "exiting program at iteration 3" in job.log
    assert [point["iteration"] for point in job.curve] == [1, 2, 3]
    assert (job.folder / "checkpoints" / "iter_0000003").is_dir()
    (alert,) = [line for line in records(job) if line["kind"] == "alert"]
    assert (alert["iteration"], alert["alert"]) == (3, "loss-spike")


@pytest.mark.parametrize("layout", ["1", "PP2"])
def test_nan_is_found_where_it_began_and_stops_the_run(jobs, layout):
    case = Case("peri", layout=layout)
    arguments = (
        f"{case.model} {case.execution} --save-interval 1000 --no-check-for-nan-in-loss-and-grad "
        "--monitor-layers all --monitor-interval 1 --monitor-stop-on nan"
    )
    change = f"{CHANGES}.poison_the_second_layer_in_iteration_three"
    job = jobs.run(f"nan-{layout}", arguments, case.ranks, changes=[change])
    assert "exiting program at iteration 3" in job.log
    assert (job.folder / "checkpoints" / "iter_0000003").is_dir()
    lines = records(job)
    alerts = [line for line in lines if line["kind"] == "alert"]
    assert {(alert["iteration"], alert["alert"]) for alert in alerts} == {(3, "nan")}
    assert [alert["layer"] for alert in alerts if alert["layer"] is not None] == [2]
    (layers,) = [line for line in lines if line["kind"] == "layers" and line["iteration"] == 3]
    finite = [isinstance(value, float) for value in layers["stream_max_abs"]]
    assert finite == [True, True, False, False, False, False]
    assert layers["stream_max_abs"][2:] == ["nan"] * 4
