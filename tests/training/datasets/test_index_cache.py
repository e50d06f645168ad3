"""The cache of dataset indices knows the data that it is of, and holds no half files."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets import blended_dataset, gpt_dataset, helpers
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer

from megatron_periln.data.indexed.format import check_indexed_dataset
from megatron_periln.data.indexed.merge import merge_datasets
from megatron_periln.data.indexed.sidecar import Sidecar, sha256_of, sidecar_path
from megatron_periln.errors import UsageError
from megatron_periln.files import locked
from megatron_periln.training.datasets import index_cache
from megatron_periln.training.datasets.index_cache import content_of, contents_of
from tests.training.model import MODEL

SIZES = [60, 20, 20]
ROUNDS, JOBS = 3, 8


def write(prefix, seed, documents):
    """Write documents of 1 to 60 tokens each; there is no sidecar."""
    draw = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(documents):
        tokens = draw.integers(0, 255, draw.integers(1, 60))
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def describe(prefix):
    """Write the sidecar of a dataset."""
    info = check_indexed_dataset(prefix)
    Sidecar(
        documents=info.documents,
        sequences=info.sequences,
        tokens=info.tokens,
        dtype=str(info.dtype),
        bytes_read=1,
        skipped={},
        tokenizer={"type": "NullTokenizer", "digest": None, "vocab_size": 256, "eod": 255, "encoder": "x"},
        append_eod=False,
        json_key="text",
        inputs=[],
        sha256={"bin": sha256_of(f"{prefix}.bin"), "idx": sha256_of(f"{prefix}.idx")},
        versions={},
        command=[],
        created="",
    ).write(sidecar_path(prefix))


NAMED = {
    "one": lambda one, two: {"blend": ([one], None), "split": "80,10,10"},
    "weighted": lambda one, two: {"blend": ([one, two], [0.3, 0.7]), "split": "80,10,10"},
    "by their sizes": lambda one, two: {"blend": ([one, two], None), "split": "80,10,10"},
    "by split": lambda one, two: {
        "blend_per_split": [([one, two], [0.3, 0.7]), ([one], None), ([two], None)]
    },
    "several validation sets": lambda one, two: {
        "blend_per_split": [([two], None), ([one, two], None), None],
        "multiple_validation_sets": True,
    },
}


def config(cache, named, **more):
    tokenizer = MegatronTokenizer.from_pretrained(
        metadata_path={"library": "null-text"}, vocab_size=255, eod_id=255
    )
    settings = {
        "random_seed": 1,
        "sequence_length": 16,
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "mid_level_dataset_surplus": 0.5,
    }
    return index_cache.GPTDatasetConfig(
        path_to_cache=cache and str(cache), tokenizer=tokenizer, **(settings | named | more)
    )


def samples(cache, named, *, stock=False, **more):
    """Build the datasets; return every sample of each."""
    settings = config(cache, named, **more)
    blends = named.get("blend_per_split") or [named["blend"]]
    settings.contents = contents_of(prefix for blend in blends if blend for prefix in blend[0])
    builder = BlendedMegatronDatasetBuilder if stock else index_cache.Builder
    kind = gpt_dataset.GPTDataset if stock else index_cache.GPTDataset
    found = []
    for dataset in builder(kind, SIZES, lambda: True, settings).build():
        for part in dataset if isinstance(dataset, list) else [dataset]:
            found.append([part[n]["tokens"].tolist() for n in range(len(part))] if part is not None else None)
    return found


@pytest.fixture
def one(tmp_path):
    return write(tmp_path / "one", 0, 60)


@pytest.fixture
def two(tmp_path):
    return write(tmp_path / "two", 1, 60)


@pytest.mark.parametrize(
    "cache, seed, documents",
    [
        pytest.param("cache", 0, 200, id="grown"),
        pytest.param("cache", 0, 30, id="shrunk"),
        pytest.param("cache", 2, 60, id="other"),
        pytest.param(None, 0, 200, id="cached beside it"),
    ],
)
@pytest.mark.parametrize("way", NAMED)
def test_data_that_changed_are_read_by_an_index_of_their_own(tmp_path, one, two, way, cache, seed, documents):
    named, cache = NAMED[way](one, two), cache and tmp_path / cache
    before = samples(cache, named)
    assert samples(cache, named) == before
    write(one, seed, documents)
    after = samples(cache, named)
    assert after != before
    for folder in ("cache", "one", "two"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    assert after == samples(cache, named)


def test_stock_megatron_goes_by_the_path(tmp_path, one, two):
    """The negative control."""
    named = NAMED["one"](one, two)
    before = samples(tmp_path / "cache", named, stock=True)
    write(one, 0, 200)
    assert samples(tmp_path / "cache", named, stock=True) == before
    assert samples(tmp_path / "fresh", named, stock=True) != before
    write(one, 0, 30)
    with pytest.raises(IndexError):
        samples(tmp_path / "cache", named, stock=True)


@pytest.mark.parametrize("way", NAMED)
def test_a_new_index_is_stock_megatrons(tmp_path, one, two, way):
    named = NAMED[way](one, two)
    assert samples(tmp_path / "ours", named) == samples(tmp_path / "stock", named, stock=True)


@pytest.mark.parametrize("way", NAMED)
def test_the_index_of_the_same_data_is_found(tmp_path, one, two, way, monkeypatch):
    named = NAMED[way](one, two)
    before = samples(tmp_path / "cache", named)
    monkeypatch.setattr(gpt_dataset, "_build_document_index", None)
    assert samples(tmp_path / "cache", named) == before


class TestContent:
    def test_a_sidecar_outlives_a_copy(self, tmp_path, one):
        describe(one)
        before = content_of(one)
        assert before["sha256"] == [sha256_of(f"{one}.bin"), sha256_of(f"{one}.idx")]
        for suffix in (".bin", ".idx", ".json"):
            shutil.copy(one + suffix, tmp_path / f"copy{suffix}")
        assert content_of(str(tmp_path / "copy")) == before

    def test_without_a_sidecar_sizes_and_times_count(self, one):
        before = content_of(one)
        assert content_of(one) == before
        os.utime(f"{one}.bin")
        assert content_of(one) != before

    @pytest.mark.parametrize("suffix", [".bin", ".idx"])
    def test_a_sidecar_older_than_the_data_is_not_theirs(self, one, suffix):
        """Even if numbers and sizes are the same: another tool wrote over our dataset."""
        describe(one)
        before = content_of(one)
        written = sidecar_path(one).stat().st_mtime_ns
        os.utime(one + suffix, ns=(written + 1, written + 1))
        assert "sha256" not in content_of(one)
        assert content_of(one) != before

    def test_a_sidecar_of_other_data_is_not_theirs(self, one):
        describe(one)
        content = json.loads(sidecar_path(one).read_text())
        for name in ("tokens", "documents", "sequences"):
            sidecar_path(one).write_text(json.dumps({**content, name: content[name] - 1}))
            assert "sha256" not in content_of(one)
        sidecar_path(one).write_text(json.dumps({**content, "dtype": "no such"}))
        assert "sha256" not in content_of(one)

    def test_a_merge_is_known_by_its_sidecar(self, tmp_path, one, two):
        describe(one)
        describe(two)
        out = str(tmp_path / "out")
        merge_datasets([one, two], out)
        before = content_of(out)
        merge_datasets([two, one], out, overwrite=True)
        assert content_of(out)["bytes"] == before["bytes"]
        assert content_of(out)["sha256"] != before["sha256"]

    def test_no_more_work_for_a_large_one(self, one):
        """Of 4 TB nothing is read."""
        for suffix in (".bin", ".idx"):
            os.truncate(one + suffix, 1 << 42)
        assert content_of(one)["bytes"] == [1 << 42, 1 << 42]

    def test_object_storage_is_known_by_its_counts(self, tmp_path, one, two, monkeypatch):
        monkeypatch.setattr(index_cache, "is_object_storage_path", lambda path: True)
        assert contents_of([one]) == {}
        named = NAMED["one"](one, two)
        before = samples(tmp_path / "cache", named)
        write(one, 2, 200)
        assert samples(tmp_path / "cache", named) != before
        assert samples(tmp_path / "cache", named) == samples(tmp_path / "fresh", named)


def test_a_run_killed_while_it_caches_leaves_no_half_file(tmp_path, one, two, monkeypatch):
    named, save = NAMED["weighted"](one, two), np.save
    expected = samples(tmp_path / "fresh", named)
    for place, module in (("shuffle_index", gpt_dataset), ("dataset_sample_index", blended_dataset)):

        def killed(file, array, place=place, **options):
            if place in str(file):
                Path(file).write_bytes(b"half")
                raise KeyboardInterrupt
            save(file, array, **options)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module.numpy, "save", killed)
            samples(tmp_path / "cache", named)
        assert not list((tmp_path / "cache").rglob(f"*-{place}.npy"))
        assert not list((tmp_path / "cache").glob("unfinished-*"))
    assert samples(tmp_path / "cache", named) == expected


@pytest.mark.parametrize("left", [0, 64, 130, -8], ids=["nothing", "half a header", "a header", "almost all"])
@pytest.mark.parametrize("place", ["document_index", "sample_index", "shuffle_index", "dataset_sample_index"])
def test_a_cache_that_was_cut_off_is_built_anew(tmp_path, one, two, place, left):
    """Stock Megatron, which wrote it, or a copy of it, was killed, or its disk was full."""
    named = NAMED["weighted"](one, two)
    expected = samples(tmp_path / "cache", named)
    (first, *_) = sorted((tmp_path / "cache").rglob(f"*-{place}.npy"))
    whole = first.read_bytes()
    first.write_bytes(whole[:left])
    with pytest.raises((ValueError, EOFError)):  # the negative control
        np.load(first, mmap_mode="r", allow_pickle=True)
    assert samples(tmp_path / "cache", named) == expected
    assert first.read_bytes() == whole


def test_what_a_killed_job_left_is_removed_once_it_is_old_and_no_job_holds_it(tmp_path, one, two):
    named, cache = NAMED["one"](one, two), tmp_path / "cache"
    old, held, young = (cache / f"unfinished-{name}" for name in ("old", "held", "young"))
    for folder in (old, held, young):
        folder.mkdir(parents=True)
        (folder / "half.npy").write_bytes(b"half")
    for folder in (old, held):
        os.utime(folder, (1, 1))
    with locked(held):
        samples(cache, named)
    assert (old.exists(), held.exists(), young.exists()) == (False, True, True)


def test_many_jobs_at_once_on_a_cold_cache_one_of_them_killed(jobs, tmp_path, one, two):
    """Forked by a process of its own: the tests' has threads, whose locks a fork may find taken."""
    where = {"COLD_CACHE": json.dumps([one, two, str(tmp_path)])}
    changes = ["tests.training.datasets.cold_cache.in_place_of_training"]
    finished = jobs.run("cold-cache", changes=changes, environment=where)
    assert finished.log.split()[-2:] == [f"{ROUNDS}", "rounds"]


def test_jobs_that_start_at_once_share_a_cache(tmp_path, one, two, monkeypatch):
    """A job writes the whole cache while another is about to."""
    named, build, jobs = NAMED["weighted"](one, two), gpt_dataset._build_shuffle_index, []

    def interrupted(*arguments):
        if not jobs:
            jobs.append(None)
            jobs.append(samples(tmp_path / "cache", named))
        return build(*arguments)

    monkeypatch.setattr(gpt_dataset, "_build_shuffle_index", interrupted)
    first = samples(tmp_path / "cache", named)
    assert first == jobs[1] == samples(tmp_path / "cache", named) == samples(tmp_path / "fresh", named)


@pytest.fixture
def blended(monkeypatch):
    """Count how often the index of a blend is computed."""
    build, computed = helpers.build_blending_indices, []
    monkeypatch.setattr(
        helpers, "build_blending_indices", lambda *arguments: (computed.append(1), build(*arguments))
    )
    return computed


def test_a_blend_has_a_place_of_its_own_for_its_index(tmp_path, one, two, blended):
    """Without one, stock Megatron computes it in every rank at every start."""
    named = NAMED["weighted"](one, two)
    expected = samples(tmp_path / "cache", named)
    del blended[:]
    assert samples(None, named) == expected == samples(None, named, stock=True)
    assert len(list((tmp_path / "one" / "cache" / "BlendedDataset_indices").glob("*index.npy"))) == 6
    at_once = len(blended)
    assert samples(None, named) == expected
    assert len(blended) == at_once == 6  # three splits, by ours and by stock Megatron
    write(one, 2, 60)
    assert samples(None, named) != expected
    assert len(blended) == 9


def test_a_blend_without_a_place_is_computed(tmp_path, one, two, blended, monkeypatch):
    """Where nothing can be written, and on a node that does not see what the first rank wrote."""
    named = NAMED["weighted"](one, two)
    expected = samples(tmp_path / "cache", named)
    (tmp_path / "one" / "cache").mkdir(parents=True)
    (tmp_path / "one" / "cache" / "BlendedDataset_indices").touch()
    del blended[:]
    assert samples(None, named) == expected
    contents = contents_of([one, two])
    monkeypatch.setitem(globals(), "contents_of", lambda _: contents)
    monkeypatch.setattr(index_cache, "_is_first_rank", lambda: False)
    assert samples(None, named) == expected
    assert len(blended) == 6


@pytest.mark.parametrize("flag", ["fast_cache_load", "defer_npy_index_mmap"])
def test_flags_that_need_a_cache(tmp_path, one, two, flag):
    named = NAMED["by split"](one, two)
    expected = samples(tmp_path / "cache", named)
    assert samples(tmp_path / "cache", named, **{flag: True}) == expected
    write(one, 2, 60)
    with pytest.raises(UsageError, match=r"no whole index there for these data .* start once without"):
        samples(tmp_path / "cache", named, **{flag: True})


def test_a_cache_that_cannot_be_written(tmp_path, one, two):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"the index of the data cannot be cached there: .*-cache-path"):
        samples(tmp_path / "file" / "cache", NAMED["one"](one, two))


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError("1048576 requested and 65424 written")],
    ids=["as the system tells it", "as numpy tells it"],
)
def test_a_full_disk_is_called_one(tmp_path, one, two, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(gpt_dataset.numpy, "save", full)
    with pytest.raises(
        UsageError, match=r"cache: .* its disk is full; make room, or choose another --data-c"
    ):
        samples(tmp_path / "cache", NAMED["one"](one, two))
    assert list((tmp_path / "cache").iterdir()) == []


def test_numpy_still_tells_no_errno_of_a_full_disk():
    with Path("/dev/full").open("wb") as full, pytest.raises(OSError, match=" requested and ") as raised:
        np.arange(1 << 20).tofile(full)
    assert raised.value.errno is None


def test_a_run_reads_a_corpus_that_grew(jobs, tmp_path):
    """Two ranks, of which the second sees other times: the first one's count."""
    prefix = write(tmp_path / "data", 0, 100)
    arguments = f"{MODEL} --eval-iters 0 --data-path {prefix}"
    before = jobs.run("index-cache-before", arguments)
    write(prefix, 1, 300)
    changes = ["tests.training.datasets.other_times.on_the_second_rank"]
    after = jobs.run("index-cache-after", arguments, ranks=2, changes=changes)
    fresh = jobs.run("index-cache-fresh", f"{arguments} --data-cache-path {tmp_path / 'cache'}", ranks=2)
    assert after.curve == fresh.curve
    assert after.curve[0]["lm loss"] != before.curve[0]["lm loss"]


def test_many_datasets_need_many_open_files(jobs, tmp_path):
    """A cold start and a warm one; the limit is raised as far as it may be, or told."""
    prefixes = [write(tmp_path / f"part{number}", number, 20) for number in range(40)]
    arguments = f"{MODEL} --seq-length 16 --data-path 1 {' 1 '.join(prefixes)}"
    cold, warm = (
        jobs.run(f"raised-{start}", arguments, changes=["tests.training.datasets.open_files.raisable"])
        for start in ("cold", "warm")
    )
    assert cold.curve == warm.curve
    failed = jobs.run(
        "few", arguments, changes=["tests.training.datasets.open_files.too_few"], succeeds=False
    )
    (error,) = [line for line in failed.log.splitlines() if line.startswith("error:")]
    assert "40 datasets hold about 520 files open, and this machine allows a process 300: raise" in error


def test_what_killed_jobs_left_is_looked_for_once_a_folder(tmp_path, monkeypatch):
    """Each dataset of a blend has files in it: to list them for each of a thousand took 11 of 16 seconds."""
    listed, glob = [], Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: listed.append(path) or glob(path, pattern))

    def build(name):
        config = SimpleNamespace(
            fast_cache_load=False, defer_npy_index_mmap=False, path_to_cache=str(tmp_path)
        )
        dataset = SimpleNamespace(config=config)
        index_cache._cached(
            dataset, str(tmp_path), [name], lambda: np.save(Path(dataset.config.path_to_cache, name), [1])
        )

    for number in range(3):
        build(f"{number}.npy")
    assert listed == [tmp_path]
    assert len(list(tmp_path.iterdir())) == 3
