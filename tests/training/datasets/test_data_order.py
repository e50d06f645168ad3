"""A run that goes on deals the samples that are left, in the order that its checkpoint was trained in."""

from argparse import Namespace

import pytest

from megatron_periln.errors import UsageError
from megatron_periln.training.datasets.data_order import digests_of, samples_to_order
from megatron_periln.training.datasets.gpt_datasets import _check_blends as check_blends
from tests.training.datasets.test_index_cache import NAMED, config, contents_of, index_cache, write
from tests.training.model import MODEL

SINGLE = Namespace(dataloader_type="single")


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write(folder / "one", 0, 60), write(folder / "two", 1, 60)


def order(tmp_path, prefixes, way="one", size=60, **more):
    return build(tmp_path, prefixes, way, (size, 20, 20), **more)[0]


def build(tmp_path, prefixes, way, sizes, **more):
    named = NAMED[way](*prefixes)
    settings = config(tmp_path / "cache", named, **more)
    blends = named.get("blend_per_split") or [named["blend"]]
    settings.contents = contents_of(prefix for blend in blends if blend for prefix in blend[0])
    return index_cache.Builder(index_cache.GPTDataset, list(sizes), lambda: True, settings).build()


def digests(*given, **more):
    return digests_of(SINGLE, order(*given, **more))


def agree(one, other):
    common = one.keys() & other.keys()
    assert len(common) > 10
    return all(one[sample] == other[sample] for sample in common)


@pytest.mark.parametrize("way", ["one", "weighted", "by split"])
def test_within_an_epoch_a_longer_run_deals_the_same_samples(tmp_path, prefixes, way):
    assert agree(digests(tmp_path, prefixes, way, 40), digests(tmp_path, prefixes, way, 60))


@pytest.mark.parametrize("way", ["one", "weighted", "by split"])
def test_across_the_end_of_an_epoch_it_deals_others(tmp_path, prefixes, way):
    short, long = order(tmp_path, prefixes, way, 60), order(tmp_path, prefixes, way, 330)
    assert not agree(digests_of(SINGLE, short), digests_of(SINGLE, long))
    same = [short[n]["tokens"].tolist() == long[n]["tokens"].tolist() for n in range(60)]
    assert sum(same) < 30  # what the digests say is so


@pytest.mark.parametrize(
    "more", [{"random_seed": 2}, {"split": "70,20,10"}, {"sequence_length": 17}], ids=str
)
def test_what_else_deals_others(tmp_path, prefixes, more):
    before = digests(tmp_path, prefixes)
    assert agree(before, digests(tmp_path, prefixes))
    assert not agree(before, digests(tmp_path, prefixes, **more))


def test_other_data_and_other_weights_deal_others(tmp_path, prefixes):
    one, two = prefixes
    assert not agree(digests(tmp_path, (one, two)), digests(tmp_path, (two, one)))
    assert not agree(digests(tmp_path, (one, two), "weighted"), digests(tmp_path, (two, one), "weighted"))


def test_indices_that_are_mapped_late_are_the_same(tmp_path, prefixes):
    assert agree(
        digests(tmp_path, prefixes, "weighted"),
        digests(tmp_path, prefixes, "weighted", defer_npy_index_mmap=True),
    )


def test_a_loader_that_shuffles_by_itself_counts(tmp_path, prefixes):
    dataset = order(tmp_path, prefixes)
    found = [
        digests_of(Namespace(dataloader_type="cyclic", micro_batch_size=size, data_parallel_size=2), dataset)
        for size in (1, 2)
    ]
    assert found[0]["loader"] != found[1]["loader"]
    assert agree(found[0], digests_of(SINGLE, dataset))


def test_fewer_samples_than_the_run_needs_are_refused():
    assert samples_to_order(Namespace(data_order_samples=None), 80) == 80
    assert samples_to_order(Namespace(data_order_samples=400), 80) == 400
    with pytest.raises(
        UsageError, match="--data-order-samples 79 are fewer than the 80 that this run trains"
    ):
        samples_to_order(Namespace(data_order_samples=79), 80)


@pytest.mark.parametrize(
    "sizes, part", [((40, 4, 4), None), ((1000, 4, 4), "training"), ((40, 4, 90), "test")]
)
def test_datasets_without_weights_that_end_before_the_run_are_refused(tmp_path, prefixes, sizes, part):
    """Megatron reads them once, and then ends in a StopIteration."""
    args = Namespace(dataloader_type="single", skip_train=False)
    datasets = build(tmp_path, prefixes, "by their sizes", sizes)
    if part is None:
        check_blends(args, datasets, sizes)
        return
    with pytest.raises(UsageError, match=rf"the 2 datasets for {part} hold \d+ samples, which are read once"):
        check_blends(args, datasets, sizes)
    check_blends(Namespace(dataloader_type="cyclic", skip_train=False), datasets, sizes)
    check_blends(args, build(tmp_path, prefixes, "weighted", sizes), sizes)
    if part == "training":
        check_blends(Namespace(dataloader_type="single", skip_train=True), datasets, sizes)


@pytest.fixture(scope="module")
def run(jobs, prefixes):
    """Runs jobs of ``iterations`` with 4 samples each, of which an epoch has some 80."""

    def run(name, iterations, more="", **how):
        flags = f"{MODEL} --seq-length 16 --train-iters {iterations} --eval-iters 0 --data-path {prefixes[0]}"
        more += " --override-opt-param-scheduler"
        return jobs.run(name, f"{flags} {more}", **how)

    return run


def test_a_run_is_lengthened_bit_for_bit_where_its_order_was_fixed_before(run):
    fixed = "--data-order-samples 240"
    straight, short = run("straight", 24, fixed), run("short", 12, fixed)
    resumed = run("resumed", 24, f"{fixed} --load {short.folder / 'checkpoints'}")
    assert short.curve + resumed.curve == straight.curve
    assert len(resumed.curve) == 12


def test_a_longer_run_of_other_samples_is_refused(run, prefixes):
    load = f"--load {run('without', 12).folder / 'checkpoints'}"
    log = run("longer", 50, load, succeeds=False).log
    assert "error: the checkpoint was trained on other samples, or in another order: " in log
    assert "--train-iters 12, and here 50); this run would meet some again and miss others" in log
    log = run("reseeded", 13, f"{load} --seed 5", succeeds=False).log
    assert "--seed 1234, and here 5" in log
    assert run("meant", 50, f"{load} --allow-data-changes --exit-interval 14").curve[0]["iteration"] == 13
    assert run("within", 14, load).curve[0]["iteration"] == 13
    once = run(
        "once", 100, f"{load} --allow-data-changes --data-path {' '.join(prefixes)}", succeeds=False
    ).log
    assert "error: the 2 datasets for training hold " in once and "and this run takes 400; give" in once
    assert run("finetuned", 50, f"{load} --finetune --exit-interval 2").curve[0]["iteration"] == 1
