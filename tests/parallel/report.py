"""Renders what the layout tests reached as docs/parallelism.md."""

from tests.parallel.cases import ARCHITECTURES, CASES, LAYOUTS, OPTIONS, RULES, VARIANTS
from tests.parallel.compare import BF16, FP32

ARCHITECTURE_NOTES = {
    "dense": "RMSNorm, SwiGLU, RoPE, grouped-query attention, untied output",
    "biased": "LayerNorm, GELU, linear biases, learned positions, output tied to the embedding",
    "moe": "every second layer 4 experts, top-2, shared expert, all-to-all dispatcher",
    "mla": "multi-latent attention",
    "whole query norms": "grouped queries; queries and keys normed over all heads (`--whole-qk-norm`)",
    "mla, whole queries": "the same without `--q-lora-rank`: queries are normed before they are projected",
    "mtp": "one multi-token prediction layer",
    "states": "Mamba layers and a gated delta net beside attention",
}

HEAD = """# Parallel layouts

Each row is a training run that was compared with one process: {steps} steps in fp32 on real text, from one
checkpoint with its optimizer state. The table is written by `make parallelism` from the tests in
[tests/parallel](../tests/parallel), which run on every commit.

- **loss**, **grad norm**: largest relative difference over all steps; bound {loss:.0e}.
- **gradients**: largest difference of any parameter's gradient in the first step, gathered to its full
  shape, relative to that parameter's largest; norms, biases and embedding norm included; bound
  {gradients:.0e}.
- **weights**: largest difference after the last step, in which a weight moves by up to 1e-3; bound
  {weights:.0e}.

Rows in bf16 are compared with one process in bf16, with bounds {bf16[loss]:.0e}, {bf16[grad_norm]:.0e},
{bf16[gradients]:.0e} and {bf16[weights]:.0e}.

| placement | model | layout | loss | grad norm | gradients | weights |
| --- | --- | --- | --- | --- | --- | --- |
"""

TAIL = """
## Models

{models}

## Flags

{flags}

## Also tested

- Mistakes that the comparison must notice, and does: output norms untagged for sequence parallelism, the
  embedding norm on the wrong stage, a norm before the bias, a gradient that is dropped
  ([test_faults.py](../tests/parallel/test_faults.py)).
- A checkpoint saved in one layout and loaded in another holds the same weights and Adam moments, bit for
  bit; a resumed run is bit-identical to one that never stopped, after asynchronous saves too
  ([test_checkpoints.py](../tests/parallel/test_checkpoints.py)).
- `pre` is stock Megatron, bit for bit, in each of three layouts
  ([test_stock.py](../tests/parallel/test_stock.py)).
- None of these steps amplifies rounding: changing each weight by 1e-6 of itself changes no step's gradient
  norm by more than 1e-5 of it ([test_conditioning.py](../tests/parallel/test_conditioning.py)).
- Dropout replays, under recomputation too, and costs the same in the mean
  ([test_dropout.py](../tests/parallel/test_dropout.py)).

## Known differences

- Multi-token prediction with context parallelism: upstream averages its loss over each rank's own tokens,
  so its gradients differ from one process's by a fraction of a percent. It is not in the table.
- Expert parallelism: moving a checkpoint to another expert-parallel size needs
  `--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable`.
- Runs that start from scratch differ between layouts, since Megatron seeds the initial weights per rank.
"""


def page(reached, steps):
    """Return the page for ``{case: distance}``."""
    rows = []
    for case, apart in ((case, reached[case]) for case in CASES if case in reached):
        model = ", ".join(filter(None, (case.architecture, case.variant)))
        layout = ", ".join(filter(None, (case.layout, case.options)))
        numbers = (apart.loss, apart.grad_norm, apart.gradients, apart.weights)
        rows.append(
            " | ".join(["", case.placement, model, layout, *(f"{x:.1e}" for x in numbers), ""]).strip()
        )
    models = "\n".join(f"- **{name}**: {ARCHITECTURE_NOTES[name]}" for name in ARCHITECTURES)
    named = {name: flags for name, (_, flags) in LAYOUTS.items()} | OPTIONS | VARIANTS | RULES
    flags = "\n".join(f"- **{name}**: `{text}`" for name, text in named.items() if text)
    return (
        HEAD.format(steps=steps, bf16=BF16, **FP32)
        + "\n".join(rows)
        + "\n"
        + TAIL.format(models=models, flags=flags)
    )
