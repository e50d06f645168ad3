"""Documents' ends are put between their tokens."""

import numpy as np
import pytest

from megatron_periln.data.preprocess.encode import _with_ends


@pytest.mark.parametrize("long", [False, True])
def test_ends_of_documents(long: bool) -> None:
    ids = np.arange(2000 if long else 50, dtype=np.uint32)
    for ends in ([], [0], [len(ids)], [0, 3, 3, 7, len(ids)], [5, 9]):
        found = _with_ends(ids, np.array(ends, np.int64), 77)
        assert found.dtype == ids.dtype
        assert found.tolist() == np.insert(ids, np.array(ends, np.int64), 77).tolist()
