"""The kernels of the norm modules, and the one place that chooses among their backends.

`megatron_periln.norms.kernels.reference` specifies what each computes; it is the only backend.
"""

from megatron_periln.norms.kernels.reference import add_norm, norm, norm_add

__all__ = ["add_norm", "norm", "norm_add"]
