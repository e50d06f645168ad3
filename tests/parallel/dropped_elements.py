"""Tells, from inside a training job, which elements each rank's residual dropout drops."""

import hashlib

from megatron_periln.norms import residual


def print_first():
    """Print a digest of what the first call of the output norm drops."""
    norm_add = residual.kernels.norm_add

    def printing(branch, bias, stream, *arguments):
        out = norm_add(branch, bias, stream, *arguments)
        dropped = (out == stream).detach()
        print(f"dropped {hashlib.sha256(dropped.numpy().tobytes()).hexdigest()} {dropped.float().mean():.3f}")
        residual.kernels.norm_add = norm_add
        return out

    residual.kernels.norm_add = printing
