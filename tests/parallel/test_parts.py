"""Gradients are joined of the parts that ranks have saved, each element of exactly one."""

import pytest
import torch

from tests.parallel.jobs import join_parts

WHOLE = torch.arange(24.0).view(2, 4, 3)


@pytest.fixture
def saved(tmp_path):
    """Save parts of ``WHOLE`` as ranks do; return what they are joined to."""

    def join(*places):
        for rank, place in enumerate(places):
            offset = tuple(index.indices(size)[0] for index, size in zip(place, WHOLE.shape, strict=True))
            torch.save([("weight", WHOLE.shape, offset, WHOLE[place])], tmp_path / f"rank{rank}.pt")
        return join_parts(tmp_path)

    return join


FIRST_LAYER = (slice(0, 1), slice(0, 4), slice(0, 3))
ITS_HALF = (slice(1, 2), slice(0, 2), slice(0, 3))
OTHER_HALF = (slice(1, 2), slice(2, 4), slice(0, 3))


def test_parts_become_the_whole(saved):
    joined = saved(FIRST_LAYER, OTHER_HALF, ITS_HALF)
    assert joined.keys() == {"weight"} and torch.equal(joined["weight"], WHOLE)


def test_a_part_that_nobody_has_saved_is_noticed(saved):
    with pytest.raises(AssertionError, match="weight: no rank has saved a part of it"):
        saved(FIRST_LAYER, ITS_HALF)


def test_a_part_that_two_ranks_have_saved_is_noticed(saved):
    with pytest.raises(AssertionError, match="weight: two ranks have saved"):
        saved(FIRST_LAYER, ITS_HALF, OTHER_HALF, ITS_HALF)
