"""Tells, from inside a training job, which elements each rank's residual dropout drops."""

import hashlib

from megatron_periln.norms import kernels


def print_first():
    """Print a digest of what the first call of the output norm drops."""
    norm_add = kernels.norm_add

    def printing(sublayer_output, sublayer_bias, residual, *arguments):
        out = norm_add(sublayer_output, sublayer_bias, residual, *arguments)
        dropped = (out == residual).detach()
        print(f"dropped {hashlib.sha256(dropped.numpy().tobytes()).hexdigest()} {dropped.float().mean():.3f}")
        kernels.norm_add = norm_add
        return out

    kernels.norm_add = printing
