"""A GPT in plain PyTorch to compare Megatron's with: the formulas, and nothing of Megatron.

`Layer.around` is the definition of the norm placements. Weights come from a Megatron state dict
(`load_megatron`), and gradients go back under Megatron's names and in its layout
(`megatron_gradients`), so that every parameter can be compared.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Shape:
    num_layers: int
    hidden_size: int
    num_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int
    max_positions: int
    placement: str
    embedding_norm: bool
    normalization: str = "RMSNorm"
    eps: float = 1e-5
    output_eps: float | None = None
    zero_centered_gamma: bool = False
    gated: bool = True
    bias: bool = False
    rope: bool = True
    tied: bool = False
    qk_norm: bool = False
    own: dict = field(default_factory=dict)  # by the kind of norm, its (weight, epsilon, zero-centered)

    @property
    def head_dim(self):
        return self.hidden_size // self.num_heads


class Norm(nn.Module):
    def __init__(self, shape, eps, size=None, kind=None):
        super().__init__()
        has_weight, own_eps, centered = shape.own.get(kind, (True, None, None))
        self.eps = eps if own_eps is None else own_eps
        self.zero_centered_gamma = shape.zero_centered_gamma if centered is None else centered
        size = size or shape.hidden_size
        self.subtracts_mean = shape.normalization == "LayerNorm"
        self.weight = nn.Parameter(torch.zeros(size) + (not self.zero_centered_gamma)) if has_weight else None
        self.bias = nn.Parameter(torch.zeros(size)) if has_weight and self.subtracts_mean else None

    def forward(self, x):
        if self.subtracts_mean:
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        if self.weight is not None:
            x = (1 + self.weight if self.zero_centered_gamma else self.weight) * x
        return x if self.bias is None else x + self.bias


def rotate(x):
    """Apply rotary position embeddings to ``[batch, heads, sequence, head_dim]``."""
    sequence, dim = x.shape[-2:]
    frequencies = 10000 ** (-torch.arange(0, dim, 2, dtype=x.dtype) / dim)
    angles = torch.arange(sequence, dtype=x.dtype)[:, None] * frequencies
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        kv_size = shape.num_query_groups * shape.head_dim
        self.query = nn.Linear(shape.hidden_size, shape.hidden_size, shape.bias)
        self.key = nn.Linear(shape.hidden_size, kv_size, shape.bias)
        self.value = nn.Linear(shape.hidden_size, kv_size, shape.bias)
        self.out = nn.Linear(shape.hidden_size, shape.hidden_size, shape.bias)
        self.query_norm, self.key_norm = (Norm(shape, shape.eps, shape.head_dim) for _ in range(2))

    def forward(self, x):
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        if self.shape.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.shape.rope:
            q, k = rotate(q), rotate(k)
        heads_per_group = self.shape.num_heads // self.shape.num_query_groups
        k, v = k.repeat_interleave(heads_per_group, 1), v.repeat_interleave(heads_per_group, 1)
        scores = q @ k.transpose(-1, -2) / self.shape.head_dim**0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        attended = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        return self.out(attended.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.gate = nn.Linear(shape.hidden_size, shape.ffn_hidden_size, shape.bias) if shape.gated else None
        self.up = nn.Linear(shape.hidden_size, shape.ffn_hidden_size, shape.bias)
        self.down = nn.Linear(shape.ffn_hidden_size, shape.hidden_size, shape.bias)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Has both norms of each sublayer; those that the placement does not use get no gradient."""

    def __init__(self, shape, number=1):
        super().__init__()
        self.shape, self.number = shape, number
        output_eps = shape.eps if shape.output_eps is None else shape.output_eps
        self.attention_input_norm, self.mlp_input_norm = (
            Norm(shape, shape.eps, kind="input") for _ in range(2)
        )
        after_add = shape.placement in ("post", "deepnorm", "keel", "mix-ln", "hybrid-norm")
        kind = "after_add" if after_add else "output"
        self.attention_output_norm, self.mlp_output_norm = (
            Norm(shape, output_eps, kind=kind) for _ in range(2)
        )
        self.attention, self.mlp = Attention(shape), MLP(shape)
        for norm in (self.attention_output_norm, self.mlp_output_norm):
            for name in ("residual_scale", "output_scale", "gate"):  # which some rules learn
                norm.register_parameter(name, nn.Parameter(torch.ones(1)))
            norm.channel_gate = nn.Parameter(torch.zeros(shape.hidden_size))

    def forward(self, x):
        x = self.around(x, self.attention, self.attention_input_norm, self.attention_output_norm)
        return self.around(x, self.mlp, self.mlp_input_norm, self.mlp_output_norm)

    def around(self, x, sublayer, input_norm, output_norm):
        layers, layer = self.shape.num_layers, self.number
        of_attention = sublayer is self.attention
        terms = 2 * layer + (not of_attention)  # of the stream with this one, the embedding among them
        match self.shape.placement:
            case "pre":
                return x + sublayer(input_norm(x))
            case "post":
                return output_norm(x + sublayer(x))
            case "peri":
                return x + output_norm(sublayer(input_norm(x)))
            case "output":
                return x + output_norm(sublayer(x))
            case "deepnorm":
                return output_norm((2 * layers) ** 0.25 * x + sublayer(x))
            case "keel":
                return output_norm(2 * layers * x + sublayer(input_norm(x)))
            case "ln-scaling":
                return x + sublayer(input_norm(x) / layer**0.5)
            case "mix-ln":
                of_first_quarter = 4 * layer <= layers
                return output_norm(x + sublayer(x)) if of_first_quarter else x + sublayer(input_norm(x))
            case "hybrid-norm":
                return output_norm(x + sublayer(x)) if of_attention else x + sublayer(x)
            case "gated-peri":
                beta = 1 / (1 + torch.exp(-output_norm.channel_gate / 0.3))
                alpha = (1 - beta**2).clamp_min(1e-3) ** 0.5
                return alpha * x + beta * output_norm(sublayer(input_norm(x)))
            case "gpas":
                total = x + sublayer(input_norm(x))
                return total - F.silu(output_norm.gate) * total.detach()
            case "scaled-peri":
                return (terms - 1) ** 0.5 / terms**0.5 * x + output_norm(sublayer(input_norm(x))) / terms**0.5


class ReferenceGPT(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.positions = nn.Embedding(shape.max_positions, shape.hidden_size)
        self.embedding_norm = Norm(shape, shape.eps, kind="embedding")
        self.layers = nn.ModuleList(Layer(shape, i + 1) for i in range(shape.num_layers))
        self.final_norm = Norm(shape, shape.eps, kind="final")
        self.unembedding = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        if shape.tied:
            self.unembedding.weight = self.tokens.weight

    def forward(self, ids):
        """Return the logits ``[batch, sequence, vocabulary]`` of ``ids``, ``[batch, sequence]``."""
        x = self.tokens(ids)
        if not self.shape.rope:
            x = x + self.positions(torch.arange(ids.size(1)))
        if self.shape.embedding_norm:
            x = self.embedding_norm(x)
        for layer in self.layers:
            x = layer(x)
        if self.shape.placement not in ("post", "deepnorm", "keel"):
            x = self.final_norm(x)
        return self.unembedding(x)


def megatron_names(model):
    """Return ``{Megatron's name: the modules whose parameters it holds}``, in Megatron's order."""
    names = {
        "embedding.word_embeddings": [model.tokens],
        "embedding.position_embeddings": [model.positions],
        "embedding.norm": [model.embedding_norm],
        "decoder.final_layernorm": [model.final_norm],
    }
    for i, layer in enumerate(model.layers):
        attention, mlp, prefix = layer.attention, layer.mlp, f"decoder.layers.{i}."
        names[prefix + "input_layernorm"] = [layer.attention_input_norm]
        names[prefix + "self_attention.linear_qkv"] = [attention.query, attention.key, attention.value]
        names[prefix + "self_attention.linear_proj"] = [attention.out]
        names[prefix + "self_attention.q_layernorm"] = [attention.query_norm]
        names[prefix + "self_attention.k_layernorm"] = [attention.key_norm]
        names[prefix + "self_attn_bda.norm"] = [layer.attention_output_norm]
        names[prefix + "pre_mlp_layernorm"] = [layer.mlp_input_norm]
        names[prefix + "mlp.linear_fc1"] = [mlp.up] if mlp.gate is None else [mlp.gate, mlp.up]
        names[prefix + "mlp.linear_fc2"] = [mlp.down]
        names[prefix + "mlp_bda.norm"] = [layer.mlp_output_norm]
    if not model.shape.tied:
        names["output_layer"] = [model.unembedding]
    return names


def join_qkv(query, key, value, shape):
    """Interleave rows as Megatron does: for each query group its query heads, its key, its value."""
    groups = [part.unflatten(0, (shape.num_query_groups, -1)) for part in (query, key, value)]
    return torch.cat(groups, dim=1).flatten(0, 1)


def split_qkv(fused, shape):
    """Undo `join_qkv`."""
    queries = shape.num_heads // shape.num_query_groups * shape.head_dim
    groups = fused.unflatten(0, (shape.num_query_groups, -1))
    return [part.flatten(0, 1) for part in groups.split([queries, shape.head_dim, shape.head_dim], dim=1)]


def load_megatron(model, state_dict):
    """Copy a Megatron GPT's weights into ``model``; every one of them must have its place."""
    names = megatron_names(model)
    with torch.no_grad():
        for name, weights in state_dict.items():
            module, _, kind = name.rpartition(".")
            if kind == "_extra_state":
                continue
            parts = names[module]
            split = split_qkv(weights, model.shape) if len(parts) == 3 else weights.chunk(len(parts))
            for part, rows in zip(parts, split, strict=True):
                getattr(part, kind).copy_(rows)
    return model


def megatron_gradients(model):
    """Return ``{Megatron's parameter name: gradient}`` of all parameters that have one."""
    gradients = {}
    for module, parts in megatron_names(model).items():
        for kind, parameter in parts[0].named_parameters():
            if parameter.grad is not None:
                grads = [getattr(part, kind).grad for part in parts]
                joined = join_qkv(*grads, model.shape) if len(parts) == 3 else torch.cat(grads)
                gradients[f"{module}.{kind}"] = joined
    return gradients
