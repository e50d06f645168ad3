"""Small Megatron models for the tests of this folder."""

import contextlib

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_periln.models import GPTModelBuilder, GPTModelConfig
from megatron_periln.norms import NormPlacement

PLACEMENTS = ["pre", "post", "peri", "output"]
# Other named rules, and one that is like each but for what makes it another.
RULES = {
    "deepnorm": "post",
    "keel": "deepnorm",
    "ln-scaling": "pre",
    "mix-ln": "pre",
    "hybrid-norm": "post",
    "scaled-peri": "peri",
    "gated-peri": "peri",
    "gpas": "pre",
}
LAYERS, HIDDEN, VOCABULARY, SEQUENCE = 2, 32, 64, 12

DEFAULTS = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "transformer_impl": "local",
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "perform_initialization": True,
}
SWIGLU = {"gated_linear_unit": True, "activation_func": F.silu}


def transformer_config(config_class=TransformerConfig, **changes):
    return config_class(**{**DEFAULTS, **changes})


def model_config(transformer, placement, config_class=GPTModelConfig, **changes):
    if isinstance(placement, str):
        placement = NormPlacement.named(placement)
    placed = {"norm_placement": placement} if config_class is GPTModelConfig else {}
    defaults = {"vocab_size": VOCABULARY, "seq_length": SEQUENCE, "position_embedding_type": "rope"}
    return config_class(transformer=transformer, **{**defaults, **changes, **placed})


def seed(value=1234):
    tensor_parallel.model_parallel_cuda_manual_seed(value)
    torch.manual_seed(value)


def groups():
    return ProcessGroupCollection.use_mpu_process_groups()


def build(placement, transformer=None, *, pre_process=None, post_process=None, **changes):
    """Build a model from one seed; ``placement`` is a name or a NormPlacement."""
    seed()
    config = model_config(transformer or transformer_config(), placement, **changes)
    return GPTModelBuilder(config).build_model(groups(), pre_process, post_process)


def perturb(model, scale=0.3):
    """Move every parameter off its initial value: biases off 0, norm weights off 1."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def tokens(batch=2):
    """Return inputs and labels, both ``[batch, SEQUENCE]``."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(VOCABULARY, (batch, SEQUENCE + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def run(model, labels=True):
    """Return the losses ``[batch, sequence]``, or without labels the logits."""
    ids, targets = tokens()
    positions = torch.arange(SEQUENCE).expand_as(ids)
    return model(ids, positions, None, labels=targets if labels else None)


def gradients(model):
    """Return ``{name: gradient}`` of one backward pass of the mean loss; None where there is none."""
    model.zero_grad()
    run(model).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def relative_error(actual, expected):
    """Return the largest difference over the largest absolute value of ``expected``, if that is not 0."""
    scale = expected.abs().max().item()
    return (actual.to(expected.dtype) - expected).abs().max().item() / (scale if scale > 1e-12 else 1.0)


@contextlib.contextmanager
def layer_outputs(model):
    """Collect the output of every transformer layer of ``model.decoder``."""
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
        for layer in model.decoder.layers
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
