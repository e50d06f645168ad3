"""The norms of a placement, as modules, and what stands for Megatron's bias-dropout-add around them.

Megatron's hooks gather a module's parameters before it is called, and may free them afterwards
(``--overlap-param-gather``, FSDP). So parameters are read while the module that owns them is called, and at
no other time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_periln.norms import kernels
from megatron_periln.norms.placement import NormPlacement, SublayerRule
from megatron_periln.norms.settings import MODELS, NormSettings

__all__ = [
    "EngineInputNorm",
    "FusedInputNorm",
    "InputNorm",
    "NoNorm",
    "Norm",
    "NormParameters",
    "NormedBiasDropoutAdd",
    "OutputNorm",
    "PlainAdd",
    "PostNorm",
    "ScaledInputNorm",
]

OutputWithBias = tuple[Tensor, Tensor | None]
BiasDropoutAdd = Callable[[OutputWithBias, Tensor, float], Tensor]
Scales = tuple[float | Tensor, float | Tensor] | tuple[()]


class NormParameters(nn.Module):
    """What an RMSNorm or a LayerNorm holds, as ``config.normalization`` says.

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
    settings
        What the norm has of its own: where it gives an epsilon, or how weights are centered, that holds.
    initial_weight
        The factor that each element starts with, also with zero-centered gamma.
    trainable
        Whether the parameters require gradients.

    Attributes
    ----------
    weight
        ``[hidden_size]``; with zero-centered gamma the factor is ``1 + weight``.
    bias
        The bias of LayerNorm, ``[hidden_size]``; None for RMSNorm. Where the settings say that there are no
        weights, both are buffers that stay at their start and are not saved.

    Raises
    ------
    ValueError
        If ``config.normalization`` is neither RMSNorm nor LayerNorm.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int | None = None,
        eps: float | None = None,
        *,
        settings: NormSettings = MODELS,
        initial_weight: float = 1.0,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        if config.normalization not in ("RMSNorm", "LayerNorm"):
            raise ValueError(
                f"normalization is RMSNorm or LayerNorm for this norm, not {config.normalization!r}"
            )
        self.hidden_size = config.hidden_size if hidden_size is None else hidden_size
        self.eps = settings.epsilon or (config.layernorm_epsilon if eps is None else eps)
        centered = settings.zero_centered
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma if centered is None else centered
        self.initial_weight = initial_weight
        for name in ("weight", "bias"):
            if name == "bias" and config.normalization == "RMSNorm":
                self.register_parameter(name, None)
            elif settings.weight:
                self.register_parameter(name, self._parameter(config, trainable))
            else:
                data = torch.empty(self.hidden_size, dtype=config.params_dtype)
                self.register_buffer(name, data, persistent=False)
        self.reset_parameters()

    def _parameter(self, config: TransformerConfig, trainable: bool) -> nn.Parameter:
        data = torch.empty(self.hidden_size, dtype=config.params_dtype)
        parameter = nn.Parameter(data, requires_grad=trainable)
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return parameter

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters to their start, as Megatron does of a model made on the meta device."""
        self.weight.fill_(self.initial_weight - 1 if self.zero_centered_gamma else self.initial_weight)
        if self.bias is not None:
            self.bias.zero_()

    def normalize(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the norm of ``x``, ``[..., hidden_size]``, in ``dtype``.

        Calls no hooks: for ``forward``, and for hooks that run when the parameters are gathered.
        """
        return kernels.norm(x, self.weight, self.bias, self.eps, self.zero_centered_gamma, dtype)

    def extra_repr(self) -> str:
        """Describe the module for ``print(model)``."""
        kind = "RMSNorm" if self.bias is None else "LayerNorm"
        weights = "" if isinstance(self.weight, nn.Parameter) else ", no weights"
        centered = f"zero_centered_gamma={self.zero_centered_gamma}"
        return f"{kind}, {self.hidden_size}, eps={self.eps}, {centered}{weights}"


class Norm(NormParameters):
    """A norm of the residual stream, in the stream's own dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``, ``[..., hidden_size]``, in its own dtype."""
        return self.normalize(x, x.dtype)


class InputNorm(NormParameters):
    """A norm whose result feeds a linear: always in the parameters' dtype.

    Differs from `Norm` with ``fp32_residual_connection``, where the residual stream is fp32 and
    the linears are not.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``, ``[..., hidden_size]``, into the dtype of the parameters."""
        return self.normalize(x, self.weight.dtype)


class EngineInputNorm(InputNorm):
    """An `InputNorm` in the place of Transformer Engine's norm, and saved as that is: with an extra state.

    Transformer Engine's rounds an fp32 residual stream to the parameters' dtype before it normalizes it.
    """

    def get_extra_state(self) -> Tensor:
        """Return what Transformer Engine saves for a norm, which has nothing to scale: no bytes."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        """Take the extra state of a checkpoint, which says nothing."""


class FusedInputNorm(InputNorm):
    """An input norm that the output norm before it computes along with the sum, in one kernel.

    It is called twice. First `OutputNorm` calls it with what the sum is of, so that the parameters of both
    are gathered while the one kernel runs; it returns the sum, and keeps the norm of it. Then the layer calls
    it with that very sum, as it does every norm, and gets what was kept. Called with another tensor, it is an
    `InputNorm`.
    """

    _sum_and_normed: tuple[Tensor, Tensor] | None = None

    def forward(
        self, x: Tensor, sum_of: kernels.NormAddArguments | None = None, scales: Scales = ()
    ) -> Tensor:
        """Normalize ``x``; or return `kernels.norm_add` of ``sum_of``, and keep the norm of that."""
        if sum_of is None:
            kept, self._sum_and_normed = self._sum_and_normed, None
            return kept[1] if kept is not None and kept[0] is x else super().forward(x)
        next_parameters = (self.weight, self.bias, self.eps, self.weight.dtype)
        self._sum_and_normed = kernels.norm_add_norm(*sum_of, *next_parameters, *scales)
        return self._sum_and_normed[0]


class ScaledInputNorm(InputNorm):
    """An `InputNorm` whose result is multiplied by a number, which the model's place of it decides.

    Attributes
    ----------
    scale
        The number; set when the model is built.
    """

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Return ``scale`` times the norm of ``x``, in the dtype of the parameters."""
        norm = (self.weight, self.bias, self.eps, self.zero_centered_gamma)
        return kernels.norm(x, *norm, self.weight.dtype, self.scale)


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


class _ScaledAdd(nn.Module):
    """What adds a sublayer's output to the residual stream: ``a`` times the stream, ``b`` times the output.

    Attributes
    ----------
    residual_scale, output_scale
        ``a`` and ``b``, which go by the place of it in the model; set when that is built. Parameters ``[1]``
        where they are learned.
    gate, channel_gate
        The parameters of `kernels.gpas`, ``[1]``, and of `kernels.gate_scales`, ``[hidden]``; None without.
    """

    def __init__(self) -> None:
        super().__init__()
        self.residual_scale: float | nn.Parameter = 1.0
        self.output_scale: float | nn.Parameter = 1.0
        self.gate: nn.Parameter | None = None
        self.channel_gate: nn.Parameter | None = None

    def learn(self, learned: str, config: TransformerConfig) -> None:
        """Make parameters of what a rule has as ``learned``; `start_at` sets them."""

        def parameter(size: int) -> nn.Parameter:
            made = nn.Parameter(torch.zeros(size, dtype=config.params_dtype))
            made.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            return made

        if learned == "scales":
            self.residual_scale, self.output_scale = parameter(1), parameter(1)
        elif learned == "gates":
            self.channel_gate = parameter(config.hidden_size)
        elif learned == "gpas":
            self.gate = parameter(1)

    @torch.no_grad()
    def start_at(self, rule: SublayerRule) -> None:
        """Take ``a`` and ``b`` of a rule; or start there, where they are learned."""
        if isinstance(self.residual_scale, nn.Parameter) and isinstance(self.output_scale, nn.Parameter):
            self.residual_scale.fill_(rule.residual_scale)
            self.output_scale.fill_(rule.output_scale)
        else:
            self.residual_scale, self.output_scale = rule.residual_scale, rule.output_scale

    @property
    def scales(self) -> Scales:
        """``a`` and ``b`` as the last arguments of kernels, which default to 1."""
        if self.channel_gate is not None:
            return kernels.gate_scales(self.channel_gate)
        a, b = self.residual_scale, self.output_scale
        return () if not isinstance(a, Tensor) and (a, b) == (1.0, 1.0) else (a, b)

    def gated(self, total: Tensor) -> Tensor:
        """Return the sum as it goes on: through `kernels.gpas`, if there is a gate."""
        return total if self.gate is None else kernels.gpas(total, self.gate)

    def extra_repr(self) -> str:
        """Describe the scales for ``print(model)``."""
        learned = isinstance(self.residual_scale, Tensor) or self.channel_gate is not None
        return "" if learned else f"scales={self.scales}"


class OutputNorm(NormParameters, _ScaledAdd):
    """``a residual + b dropout(norm(sublayer_output + sublayer_bias))``: Peri-LN and output-only.

    Attributes
    ----------
    next_norm
        The norm of the sum that comes next in the layer, to be computed along with it; see `compute_next`.
    """

    next_norm: FusedInputNorm | None = None

    def __init__(self, config: TransformerConfig, placement: NormPlacement) -> None:
        super().__init__(
            config,
            settings=placement.settings_of("output"),
            initial_weight=placement.initial_output_weight(config.num_layers, config.is_hybrid_model),
            trainable=not placement.freeze_output_norm,
        )

    def compute_next(self, norm: FusedInputNorm | None) -> None:
        """Compute ``norm`` of the sum along with the sum from now on; with None the sum alone."""
        # It is the layer's module. nn.Module's own __setattr__ would make it one of this module too, and its
        # parameters would be saved twice.
        object.__setattr__(self, "next_norm", norm)

    def forward(
        self,
        sublayer_output: Tensor,
        sublayer_bias: Tensor | None,
        residual: Tensor,
        dropout: float,
        training: bool,
    ) -> Tensor:
        """Normalize a sublayer's output, bias included, then add it to the residual stream.

        ``sublayer_output`` and ``residual`` are ``[sequence, batch, hidden]``; ``sublayer_bias`` is the bias
        that the sublayer's last linear left to be added, ``[hidden]``. The sum has the residual's dtype.
        """
        norm = (self.weight, self.bias, self.eps, self.zero_centered_gamma)
        arguments = (sublayer_output, sublayer_bias, residual, *norm, dropout, training)
        if self.next_norm is None:
            return self.gated(kernels.norm_add(*arguments, *self.scales))
        return self.next_norm(sublayer_output, sum_of=arguments, scales=self.scales)


class PostNorm(NormParameters, _ScaledAdd):
    """``norm(a residual + b dropout(sublayer_output + sublayer_bias))``: Post-LN."""

    def forward(
        self,
        sublayer_output: Tensor,
        sublayer_bias: Tensor | None,
        residual: Tensor,
        dropout: float,
        training: bool,
    ) -> Tensor:
        """Add a sublayer's output, bias included, to the residual stream, then normalize the sum.

        Shapes and dtypes are those of `OutputNorm`.
        """
        norm = (self.weight, self.bias, self.eps, self.zero_centered_gamma)
        arguments = (sublayer_output, sublayer_bias, residual, *norm, dropout, training)
        return self.gated(kernels.add_norm(*arguments, *self.scales))


class PlainAdd(_ScaledAdd):
    """``a residual + b dropout(sublayer_output + sublayer_bias)``: no norm after the sublayer."""

    def forward(
        self,
        sublayer_output: Tensor,
        sublayer_bias: Tensor | None,
        residual: Tensor,
        dropout: float,
        training: bool,
    ) -> Tensor:
        """Add a sublayer's output, bias included, to the residual stream; shapes as in `OutputNorm`."""
        arguments = (sublayer_output, sublayer_bias, residual, dropout, training)
        return self.gated(kernels.add(*arguments, *self.scales))


class NormedBiasDropoutAdd(nn.Module):
    """Takes the place of Megatron's ``get_bias_dropout_add``, with the norm and scales of a rule.

    ``TransformerLayer`` (megatron/core/transformer/transformer_layer.py) builds ``submodules.self_attn_bda``
    and ``submodules.mlp_bda``, and calls them as ``bda(training, fused)((output, bias), residual, dropout)``.
    As a module it owns the norm's parameters, ``self_attn_bda.norm.weight`` and so on, which Megatron then
    shards, checkpoints, reduces and optimizes like any other.

    Parameters
    ----------
    config
        The model's.
    placement
        For the options and settings of its norms.
    rule
        Which norm stands here; `set_scales` sets the rest of it. By default that of the whole placement.

    Attributes
    ----------
    called
        Whether it has added anything yet.
    """

    called = False

    def __init__(
        self, config: TransformerConfig, placement: NormPlacement, rule: SublayerRule | None = None
    ) -> None:
        super().__init__()
        of: NormPlacement | SublayerRule = rule or placement
        self.norm: OutputNorm | PostNorm | PlainAdd
        if of.output:
            self.norm = OutputNorm(config, placement)
        else:
            self.norm = PostNorm(config, settings=placement.norms.after_add) if of.after_add else PlainAdd()
        self.norm.learn(of.learned, config)

    def set_scales(self, rule: SublayerRule) -> None:
        """Take the scales of the sublayer's rule, which goes by the place in the model; or start there."""
        self.norm.start_at(rule)

    def forward(self, training: bool, fused: bool) -> BiasDropoutAdd:
        """Return the function that adds a sublayer's output to the residual stream.

        ``fused`` is Megatron's ``bias_dropout_fusion``; the kernels choose their own backend.
        """
        return partial(self._add, training=training)

    def _add(
        self, output_with_bias: OutputWithBias, residual: Tensor, dropout: float, *, training: bool
    ) -> Tensor:
        self.called = True
        sublayer_output, sublayer_bias = output_with_bias
        return self.norm(sublayer_output, sublayer_bias, residual, dropout, training)
