"""Jobs that start at the same moment on a cold cache, at which one dies in the midst of building it."""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

from megatron.core.datasets import gpt_dataset

from megatron_periln.training.datasets.index_cache import _is_whole
from tests.training.datasets.test_index_cache import JOBS, NAMED, ROUNDS, samples

CONTEXT = multiprocessing.get_context("fork")


def job(number, built, cache, named, expected, moment, results):
    """Be a job; the first dies when it has ``built`` indices, at which the others start."""
    if number == 0:
        build, left = gpt_dataset._build_shuffle_index, iter(range(built))

        def fatal(*given):
            if next(left, None) is None:
                moment.wait()
                os.kill(os.getpid(), signal.SIGKILL)
            return build(*given)

        gpt_dataset._build_shuffle_index = fatal
    else:
        moment.wait()
    results.put(samples(cache, named) == expected)


def in_place_of_training():
    """Run them in a process that has no threads, of two datasets and a folder that ``COLD_CACHE`` names."""
    rounds(*json.loads(os.environ["COLD_CACHE"]))
    sys.exit()


def rounds(one, two, folder):
    """Run the rounds; an assertion fails where a job did not get what one alone gets."""
    named = NAMED["weighted"](one, two)
    expected = samples(Path(folder, "fresh"), named)
    for number in range(ROUNDS):
        cache = Path(folder, f"cache-{number}")
        moment, results = CONTEXT.Barrier(JOBS), CONTEXT.SimpleQueue()
        jobs = [
            CONTEXT.Process(target=job, args=[which, number % 3, cache, named, expected, moment, results])
            for which in range(JOBS)
        ]
        for process in jobs:
            process.start()
        for process in jobs:
            process.join()
        assert [process.exitcode for process in jobs] == [-signal.SIGKILL] + [0] * (JOBS - 1)
        assert [results.get() for _ in jobs[1:]] == [True] * (JOBS - 1)
        assert samples(cache, named) == expected
        assert all(_is_whole(path) for path in cache.glob("*.npy"))
    print(ROUNDS, "rounds")
