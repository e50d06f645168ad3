"""The norm that Megatron's local layers, the residual slots and the embedding share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_periln.norms import kernels

__all__ = ["InputNorm", "JoinedNorm", "NoNorm", "Norm", "SlotNorm"]


class Norm(nn.Module):
    """RMSNorm or LayerNorm, as ``config.normalization`` says.

    Its parameters are tagged for sequence parallelism, so that Megatron sums their gradients over
    the tensor-parallel group (``finalize_model_grads``).

    Parameters
    ----------
    config
        Gives the kind of norm, ``params_dtype``, ``layernorm_zero_centered_gamma`` and
        ``sequence_parallel``.
    hidden_size
        Size of the last dimension; ``config.hidden_size`` by default.
    eps
        ``config.layernorm_epsilon`` by default.
    initial_gain
        The factor that each element starts with, also with zero-centered gamma.
    trainable
        Whether the parameters require gradients.

    Attributes
    ----------
    weight
        The gain, ``[hidden_size]``.
    bias
        The shift of LayerNorm, ``[hidden_size]``; None for RMSNorm.

    Raises
    ------
    ValueError
        If ``config.normalization`` is neither RMSNorm nor LayerNorm.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int | None = None,
        eps: float | None = None,
        *,
        initial_gain: float = 1.0,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        if config.normalization not in ("RMSNorm", "LayerNorm"):
            raise ValueError(
                f"normalization is RMSNorm or LayerNorm for this norm, not {config.normalization!r}"
            )
        self.hidden_size = config.hidden_size if hidden_size is None else hidden_size
        self.eps = config.layernorm_epsilon if eps is None else eps
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        self.initial_gain = initial_gain
        self.weight = self._parameter(config, trainable)
        self.bias = self._parameter(config, trainable) if config.normalization == "LayerNorm" else None
        self.reset_parameters()

    def _parameter(self, config: TransformerConfig, trainable: bool) -> nn.Parameter:
        data = torch.empty(self.hidden_size, dtype=config.params_dtype)
        parameter = nn.Parameter(data, requires_grad=trainable)
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return parameter

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters to their start, as Megatron does of a model made on the meta device."""
        self.weight.fill_(self.initial_gain - 1 if self.zero_centered_gamma else self.initial_gain)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``, ``[..., hidden_size]``, in its own dtype."""
        return kernels.norm(x, self.weight, self.bias, self.eps, self.zero_centered_gamma, x.dtype)

    def extra_repr(self) -> str:
        """Describe the module for ``print(model)``."""
        kind = "RMSNorm" if self.bias is None else "LayerNorm"
        return f"{kind}, {self.hidden_size}, eps={self.eps}, zero_centered_gamma={self.zero_centered_gamma}"


class SlotNorm(Norm):
    """A norm that a residual slot computes along with its sum.

    The slot calls it with what is to be computed, rather than read its parameters, which may not have been
    gathered yet: Megatron's hooks do that for a module that is called (``--overlap-param-gather``, FSDP).
    """

    def forward(self, x: Tensor, compute: Callable[..., Tensor] | None = None) -> Tensor:
        """Normalize ``x``; or return ``compute(gain, shift, epsilon, zero_centered_gamma)``."""
        if compute is None:
            return super().forward(x)
        return compute(self.weight, self.bias, self.eps, self.zero_centered_gamma)


class InputNorm(Norm):
    """A norm whose result feeds a linear: always in the parameters' dtype.

    Differs from `Norm` with ``fp32_residual_connection``, where the residual stream is fp32 and
    the linears are not.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``, ``[..., hidden_size]``, into the dtype of the parameters."""
        weight = self.weight
        return kernels.norm(x, weight, self.bias, self.eps, self.zero_centered_gamma, weight.dtype)


class JoinedNorm(InputNorm):
    """An input norm that the residual slot before it computes along with its sum, in one kernel.

    The slot calls it with what the sum is of, and gets the sum; the layer then calls it with that very
    sum, as it does every norm, and gets what is already there. Called with another tensor, it is an
    `InputNorm`. It is called both times, so that Megatron's hooks gather its parameters before they are
    read (``--overlap-param-gather``).
    """

    _ready: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, sum_of: tuple[Any, ...] | None = None) -> Tensor:
        """Normalize ``x``; or return `kernels.norm_add` of ``sum_of``, and keep the norm of that."""
        if sum_of is None:
            ready, self._ready = self._ready, None
            return ready[1] if ready is not None and ready[0] is x else super().forward(x)
        parameters = (self.weight, self.bias, self.eps, self.weight.dtype)
        self._ready = kernels.norm_add_norm(*sum_of, *parameters)
        return self._ready[0]


class NoNorm(IdentityOp):
    """Stands where a placement has no norm before a linear: casts, and changes nothing else.

    Parameters
    ----------
    config
        Gives ``params_dtype``, which the linears expect when ``fp32_residual_connection`` makes
        the residual stream fp32.
    """

    def __init__(self, config: TransformerConfig, *_: object, **__: object) -> None:
        super().__init__()
        self.dtype = config.params_dtype

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        """Return ``x`` in the dtype of the parameters."""
        return x.to(self.dtype)
