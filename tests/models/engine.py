"""Transformer Engine's modules as Megatron's specs use them, without it: what they take, refuse and save.

Megatron writes its own specs for Transformer Engine and `place_norms` edits them; only then do the stand-ins
take the place of its classes, so that a model can be built and run.
"""

import functools
import zlib
from dataclasses import fields, is_dataclass, replace

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine as te
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_periln.models import gpt
from megatron_periln.models.specs import with_submodules

IN_LINEARS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Where Transformer Engine has a layer's input norms, and the name of each that stands by itself."""


def load_as_local(local, state):
    """Give a model of local layers the weights of one of Transformer Engine's.

    Its final norm is Transformer Engine's all the same, where that is installed.
    """
    missing, unexpected = local.load_state_dict(as_local(state), strict=False)
    assert not unexpected
    assert [name for name in missing if not name.endswith("_extra_state")] == []


def perturb(model, scale=0.3):
    """Move every parameter off its initial value, wherever it stands: by its name among local layers.

    `small.perturb` goes by the parameters' order, which changes as a norm moves out of a linear.
    """
    with torch.no_grad():
        for name, parameter in as_local(dict(model.named_parameters())).items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def as_local(state):
    """Return a model's weights by the names that Megatron's local layers give them."""
    renamed = {}
    for name, weight in state.items():
        if "_extra_state" in name:
            continue
        for fused, own in IN_LINEARS.items():
            name = name.replace(fused, own)
        renamed[name] = weight
    return renamed


class Saved:
    """An extra state, as every module of Transformer Engine has one."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state.numel() == 0


def _norm(x, weight, bias, eps):
    kind = F.rms_norm if bias is None else F.layer_norm
    parameters = (weight.float(),) if bias is None else (weight.float(), bias.float())
    return kind(x.float(), weight.shape, *parameters, eps=eps).to(weight.dtype)


class Norm(Saved, nn.Module):
    """Rounds its input to the parameters' dtype (``maybe_dequantize`` in ops/basic/rmsnorm.py)."""

    def __init__(self, config, hidden_size, eps=1e-5, has_residual=False):
        super().__init__()
        self.eps = eps
        self.returns_residual = has_residual and config.fused_residual_rmsnorm
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        layer_norm = config.normalization == "LayerNorm"
        self.bias = nn.Parameter(torch.zeros_like(self.weight)) if layer_norm else None

    def forward(self, x):
        normed = _norm(x.to(self.weight.dtype), self.weight, self.bias, self.eps)
        return (normed, x) if self.returns_residual else normed


class NormWithResidual(Norm):
    def __init__(self, *args, **options):
        super().__init__(*args, **options, has_residual=True)


def _check(linear, x):
    """Refuse another dtype than the parameters', as set_activation_dtype of module/base.py does."""
    if x.dtype != linear.weight.dtype:
        raise TypeError(f"Data types for parameters must match. Found input dtype: {x.dtype}")


class Column(Saved, ColumnParallelLinear):
    def forward(self, x, *args, **kwargs):
        _check(self, x)
        return super().forward(x, *args, **kwargs)


class Row(Saved, RowParallelLinear):
    def forward(self, x, *args, **kwargs):
        _check(self, x)
        return super().forward(x, *args, **kwargs)


class NormColumn(Column):
    def __init__(self, input_size, output_size, *, config, **options):
        super().__init__(input_size, output_size, config=config, **options)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        layer_norm = config.normalization == "LayerNorm"
        self.layer_norm_bias = nn.Parameter(torch.zeros_like(self.layer_norm_weight)) if layer_norm else None

    def forward(self, x, *args, **kwargs):
        _check(self, x)
        x = _norm(x, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return super().forward(x, *args, **kwargs)


STAND_INS = {
    te.TENorm: Norm,
    TESpecProvider().layer_norm(has_residual=True): NormWithResidual,
    te.TELayerNormColumnParallelLinear: NormColumn,
    te.TEColumnParallelLinear: Column,
    te.TERowParallelLinear: Row,
    te.TEDotProductAttention: DotProductAttention,
}


def swap(spec):
    """Return a spec with the stand-ins; where Transformer Engine is missing, its classes are mocks."""
    for theirs, ours in STAND_INS.items():
        if spec is theirs:
            return ours
    if isinstance(spec, list):
        return [swap(part) for part in spec]
    if isinstance(spec, ModuleSpec):
        return with_submodules(spec, swap(spec.submodules))
    if isinstance(spec, functools.partial) and "submodules" in spec.keywords:
        return with_submodules(spec, swap(spec.keywords["submodules"]))
    if is_dataclass(spec) and not isinstance(spec, type):
        return replace(spec, **{part.name: swap(getattr(spec, part.name)) for part in fields(spec)})
    return spec


def stand_in(monkeypatch):
    """Let GPTModelBuilder build a spec of Transformer Engine's with stand-ins for its modules."""
    placed = gpt.placed_layer_spec
    monkeypatch.setattr(gpt, "LayerNormImpl", te.TENorm)  # as it is where Transformer Engine is installed
    monkeypatch.setattr(te, "TENorm", Norm)  # `separate_norm` builds one
    monkeypatch.setattr(gpt, "placed_layer_spec", lambda *args, **kwargs: swap(placed(*args, **kwargs)))
