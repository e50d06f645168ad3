#!/usr/bin/env bash
# numpy 2.3: ndarray.tofile, with which numpy.save writes an array behind its header, raises an OSError without errno where
# the disk is full: its text is "N requested and M written". A handler that looks for errno.ENOSPC, as every other write
# of Python's raises it, misses it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q numpy==2.3.5
"$folder/env/bin/python" - <<'PYTHON'
import errno

import numpy as np

print("numpy", np.__version__)
data = np.arange(1 << 20)
try:
    with open("/dev/full", "wb", buffering=0) as full:
        full.write(data)
except OSError as error:
    print("a write of Python's:", repr(error))
    assert error.errno == errno.ENOSPC
try:
    with open("/dev/full", "wb") as full:
        data.tofile(full)
except OSError as error:
    print("ndarray.tofile:", repr(error))
    assert error.errno is None, "the behaviour changed"
else:
    raise SystemExit("the behaviour changed")
PYTHON
