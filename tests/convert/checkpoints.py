"""Small checkpoints with random weights, and what their models compute."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_periln.megatron_arguments import megatron_arguments
from megatron_periln.models.one_process import build_model, megatron_config, megatron_logits
from megatron_periln.norms.arguments import placement_of
from megatron_periln.training.parsing import add_arguments

LAYERS, VOCABULARY, POSITIONS = 3, 160, 64

# Grouped queries, and heads that are not the hidden size together: 4 * 24 = 96.
COMMON = f"""--num-layers {LAYERS} --hidden-size 64 --ffn-hidden-size 112 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --kv-channels 24 --padded-vocab-size {VOCABULARY}
    --max-position-embeddings {POSITIONS} --seq-length {POSITIONS} --normalization RMSNorm --swiglu
    --norm-epsilon 1e-3 --position-embedding-type rope --rotary-base 500 --disable-bias-linear """
UNTIED = "--untie-embeddings-and-output-weights "
BIASES = COMMON.replace("--disable-bias-linear", "")
EXPERTS = " --num-experts 6 --moe-router-topk 2 --moe-ffn-hidden-size 48"
MUP = "--use-mup --mup-base-hidden-size 32 --mup-embedding-mult 3 --mup-output-mult 0.7 "


@dataclass(frozen=True)
class Saved:
    """A checkpoint, and its model."""

    folder: Path
    model: GPTModel

    def logits(self, tokens):
        return megatron_logits(self.model, tokens)


def arguments(flags):
    """Return Megatron's arguments as they are saved with a checkpoint."""
    args = megatron_arguments(shlex.split(flags), add_arguments)
    args.embedding_norm = placement_of(args).embedding
    args.params_dtype = torch.bfloat16 if args.bf16 else torch.float32
    return args


def randomize(model):
    """Give every parameter random values with which the logits are about 1 apart."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                noise /= parameter.size(1) ** 0.5
            elif parameter.dim() == 1 and "bias" not in name:
                norm, stock = model.get_submodule(name.rpartition(".")[0]), model.config
                zero_centered = getattr(norm, "zero_centered_gamma", stock.layernorm_zero_centered_gamma)
                noise = noise * 0.3 + (0 if zero_centered else 1)
            parameter.copy_(noise)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model


def save(folder, flags, step=7, **changes):
    """Save a random model as a distributed checkpoint of one process, whose arguments say ``changes``."""
    args = arguments(flags)
    model = randomize(build_model(megatron_config(args, args.params_dtype)))
    vars(args).update(changes)
    path = folder / f"iter_{step:07d}"
    path.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
    state = {"args": args, "checkpoint_version": 3.0, "iteration": step}
    dist_checkpointing.save({**state, "model": model.sharded_state_dict()}, str(path), async_strategy="mcore")
    return Saved(folder, model)


def sample(batch=2, length=40):
    """Return tokens that no export has seen, ``[batch, length]``."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))


def greedy(logits_of, prompt, count):
    """Continue each row of ``prompt`` by ``count`` most probable tokens, without a cache."""
    tokens = prompt
    for _ in range(count):
        tokens = torch.cat([tokens, logits_of(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens[:, prompt.size(1) :]
