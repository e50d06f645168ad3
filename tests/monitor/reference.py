"""Every statistic, computed in fp64 from the formulas on the plain-PyTorch GPT: no hooks, no Megatron."""

import math

import torch
from torch.nn import functional as F

from tests.reference_gpt import megatron_gradients


def unroll(model, ids):
    """Return the logits, the residual stream at 0 .. L (+ final norm), and each sublayer's tensors.

    The latter are ``(stream before, output, what is added)``, by sublayer's name, one a layer.
    """
    placement = model.shape.placement
    x = model.tokens(ids)
    if not model.shape.rope:
        x = x + model.positions(torch.arange(ids.size(1)))
    if model.shape.embedding_norm:
        x = model.embedding_norm(x)
    streams, sublayers = [x], {"attention": [], "mlp": []}
    for layer in model.layers:
        for name in sublayers:
            parts = [getattr(layer, f"{name}{part}") for part in ("", "_input_norm", "_output_norm")]
            sublayer, input_norm, output_norm = parts
            output = sublayer(input_norm(x) if placement in ("pre", "peri", "scaled-peri") else x)
            added = output_norm(output) if placement in ("peri", "output", "scaled-peri") else output
            if placement == "scaled-peri":
                terms = 2 * layer.number + (name == "mlp")
                x, added = ((terms - 1) / terms) ** 0.5 * x, added / terms**0.5
            sublayers[name].append((x, output, added))
            x = output_norm(x + added) if placement == "post" else x + added
        streams.append(x)
    if placement != "post":
        x = model.final_norm(x)
        streams.append(x)
    return model.unembedding(x), streams, sublayers


def statistics(model, microbatches):
    """Return ``{statistic: [value of layer 0 .. L + 1]}`` of the mean loss over ``(ids, labels)`` pairs."""
    depth = model.shape.num_layers
    streams, sublayers = [], []
    for ids, labels in microbatches:
        logits, stream, outputs = unroll(model, ids)
        for x in stream:
            x.retain_grad()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        (loss / len(microbatches)).backward()
        streams.append(stream)
        sublayers.append(outputs)

    def concatenated(tensors):
        return torch.cat([tensor.flatten(0, 1) for tensor in tensors])

    table = {}
    layers = range(len(streams[0]))
    x = [concatenated(stream[i].detach() for stream in streams) for i in layers]
    table["stream_mean_square"] = [mean_square(x[i]) for i in layers]
    table["stream_variance"] = [variance(x[i]) for i in layers]
    table["stream_max_abs"] = [x[i].abs().max().item() for i in layers]
    table["stream_fp16_half_fraction"] = [(x[i].abs() > 65504 / 2).double().mean().item() for i in layers]
    cosines = [F.cosine_similarity(x[i - 1], x[i], dim=-1) for i in range(1, depth + 1)]
    table["angular_distance"] = [None, *(c.clamp(-1, 1).arccos().mean().item() / math.pi for c in cosines)]
    gradients = [concatenated(stream[i].grad for stream in streams) for i in layers]
    table["stream_gradient_norm"] = [gradient.norm().item() for gradient in gradients]
    for name in ("attention", "mlp"):
        rows = [
            [concatenated(parts) for parts in zip(*(outputs[name][i] for outputs in sublayers), strict=True)]
            for i in range(depth)
        ]
        table[f"{name}_mean_square"] = [None, *(mean_square(output) for _, output, _ in rows)]
        table[f"{name}_variance"] = [None, *(variance(output) for _, output, _ in rows)]
        table[f"{name}_output_mean_square"] = [None, *(mean_square(added) for *_, added in rows)]
        table[f"{name}_output_variance"] = [None, *(variance(added) for *_, added in rows)]
        ratios = [(mean_square(added) / mean_square(before)) ** 0.5 for before, _, added in rows]
        table[f"{name}_ratio"] = [None, *ratios]
        norms = [getattr(layer, f"{name}_output_norm") for layer in model.layers if placed(model)]
        weights = [norm.weight.detach() + norm.zero_centered_gamma for norm in norms]
        terms = [2 * layer.number + (name == "mlp") for layer in model.layers]
        terms = terms if model.shape.placement == "scaled-peri" else []
        table[f"{name}_residual_scale"] = [None, *(((n - 1) / n) ** 0.5 for n in terms)]
        table[f"{name}_output_scale"] = [None, *(n**-0.5 for n in terms)]
        for end in ("mean", "min", "max"):
            table[f"{name}_gain_{end}"] = [None, *(getattr(weight, end)().item() for weight in weights)]
    table.update(parameter_gradients(megatron_gradients(model), depth, model.shape))
    return {name: [*values, *[None] * (depth + 2 - len(values))] for name, values in table.items()}


def parameter_gradients(gradients, depth, shape):
    """Return the norms of each layer's gradients, from gradients by Megatron's names."""
    modules = {
        "attention": ("self_attention.linear_qkv", "self_attention.linear_proj"),
        "mlp": ("mlp.linear_fc1", "mlp.linear_fc2"),
        "norm": ("input_layernorm", "pre_mlp_layernorm", "self_attn_bda.norm", "mlp_bda.norm"),
    }

    def norm(names):
        own = [g for name, g in gradients.items() if name.rpartition(".")[0] in names]
        return sum(g.square().sum() for g in own).item() ** 0.5 if own else None

    table = {
        f"{part}_gradient_norm": [
            None,
            *(norm([f"decoder.layers.{i}.{name}" for name in names]) for i in range(depth)),
        ]
        for part, names in modules.items()
    }
    table["norm_gradient_norm"][0] = norm(["embedding.norm"])
    table["norm_gradient_norm"].append(norm(["decoder.final_layernorm"]))
    return table


def placed(model):
    """Tell whether sublayers have a norm after them."""
    return model.shape.placement != "pre"


def mean_square(x):
    return x.square().mean().item()


def variance(x):
    """Return the mean over tokens of the variance over the hidden dimension."""
    return (x - x.mean(-1, keepdim=True)).square().mean().item()
