"""Inputs and errors of the norm kernels, on whichever device the tests run on.

Errors are the largest difference from the fp64 formulas, relative to the largest value of the
tensor in question.
"""

import itertools
from dataclasses import dataclass, replace

import torch

from tests.conftest import DEVICE as TEST_DEVICE
from tests.norms import formulas

DEVICE = TEST_DEVICE if torch.cuda.is_available() else "cpu"

# Half the distance of neighbours, and what fp32 arithmetic adds.
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2.0**-11 * 1.1,
    torch.bfloat16: 2.0**-8 * 1.1,
}
NAMES = ("sublayer_output", "sublayer_bias", "residual", "weight", "bias")


@dataclass(frozen=True)
class Case:
    """One call of ``norm_add``."""

    rows: tuple = (7, 3)
    hidden: int = 96
    dtype: torch.dtype = torch.float32
    residual_dtype: torch.dtype = torch.float32
    layer_norm: bool = False
    sublayer_bias: bool = False
    zero_centered_gamma: bool = False
    magnitude: float = 1.0
    eps: float = 1e-5
    scales: tuple = ()

    def __str__(self):
        dtypes = "-".join(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.residual_dtype))
        options = ["layernorm" if self.layer_norm else "rmsnorm"]
        options += ["bias"] * self.sublayer_bias + ["zero-centered"] * self.zero_centered_gamma
        options += [f"{scale:g}" for scale in self.scales]
        return (
            f"{'x'.join(map(str, self.rows))}x{self.hidden}-{dtypes}-{'-'.join(options)}-{self.magnitude:g}"
        )

    def tensors(self):
        """Return the tensors that `NAMES` lists, and the gradient of the result."""
        generator = torch.Generator().manual_seed(17 * self.hidden + sum(self.rows))

        def random(*shape, dtype, scale=1.0, offset=0.0):
            values = scale * torch.randn(*shape, generator=generator, dtype=torch.float64) + offset
            return values.to(DEVICE, dtype)

        shape, vector = (*self.rows, self.hidden), (self.hidden,)
        inputs = [
            random(*shape, dtype=self.dtype, scale=self.magnitude),
            random(*vector, dtype=self.dtype, scale=2 * self.magnitude) if self.sublayer_bias else None,
            random(*shape, dtype=self.residual_dtype),
            random(*vector, dtype=self.dtype, scale=0.3, offset=0.0 if self.zero_centered_gamma else 1.0),
            random(*vector, dtype=self.dtype) if self.layer_norm else None,
        ]
        return inputs, random(*shape, dtype=self.residual_dtype)


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
]
OPTIONS = list(itertools.product([False, True], repeat=3))  # layer_norm, sublayer_bias, zero_centered_gamma
SHAPES = [((1,), 1), ((2, 1), 3), ((33,), 64), ((2, 2, 5), 160), ((5, 1), 1000), ((9,), 2048), ((3,), 2560)]

GRID = [Case((7, 3), 96, *dtypes, *options) for dtypes, options in itertools.product(DTYPES, OPTIONS)]
GRID += [
    # In rows this short the gradient is what eps leaves of a difference.
    Case(*shape, *DTYPES[i % len(DTYPES)], *OPTIONS[j], eps=1.0 if shape[1] < 4 else 1e-5)
    for i, shape in enumerate(SHAPES)
    for j in (0, 3, 6)
]
GRID += [Case((2,), 12288, *DTYPES[1]), Case((1,), 16384, *DTYPES[0], layer_norm=True, sublayer_bias=True)]
GRID += [
    replace(Case((5,), 160, dtype, dtype, *options), magnitude=magnitude)
    for dtype, options, magnitude in itertools.product(
        [torch.float32, torch.bfloat16], [OPTIONS[0], OPTIONS[6]], [1e-15, 1e15]
    )
]
SCALES = (0.7, -1.6)
GRID += [
    Case(*shape, *dtypes, *OPTIONS[j], scales=scales)
    for (shape, dtypes), j, scales in itertools.product(
        [(((7, 3), 96), DTYPES[1]), (((5,), 160), DTYPES[3]), (((2,), 12288), DTYPES[0])],
        (0, 6),
        (SCALES, (SCALES[0], 1.0), (1.0, SCALES[1])),
    )
]
GRID += [Case((5,), 160, torch.float16, torch.float16, *OPTIONS[j], magnitude=5e3) for j in (0, 6)]


def evaluate(function, inputs, grad, case, dropout=0.0, **options):
    """Return the result of ``function`` and its gradients, ``{name: tensor}``."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    settings = {"eps": case.eps, "zero_centered_gamma": case.zero_centered_gamma} | options
    scales = settings.get("scales", case.scales)
    out = function(*leaves, settings["eps"], settings["zero_centered_gamma"], dropout, True, *scales)
    out.backward(grad)
    named = {f"d {name}": leaf.grad for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
    return {"out": out.detach(), **named}


def exact(inputs, grad, case, mask=1.0):
    """Return the same by the fp64 formulas; ``mask`` is 0 or 1/(1-p) where there is dropout."""
    in_fp64 = [None if t is None else t.detach().cpu().double().requires_grad_() for t in inputs]
    out = formulas.norm_add(
        *in_fp64, case.eps, case.zero_centered_gamma, mask=mask, scales=case.scales or (1, 1)
    )
    out.backward(grad.cpu().double())
    named = {f"d {name}": leaf.grad for name, leaf in zip(NAMES, in_fp64, strict=True) if leaf is not None}
    return {"out": out.detach(), **named}


def errors(mine, theirs):
    """Return ``{name: error}``; NaN counts as infinitely wrong."""
    assert mine.keys() == theirs.keys()
    return {name: _error(mine[name], theirs[name]) for name in mine}


def _error(mine, theirs):
    difference = (mine.detach().cpu().double() - theirs).abs()
    scale = theirs.abs().max().clamp_min(1e-30)
    return (difference.max() / scale).nan_to_num(nan=float("inf")).item() if theirs.numel() else 0.0


def worst_in_roundings(mine, theirs):
    """Return the largest error, in units of its tensor's rounding; at most 1 is right."""
    return max(error / ROUNDING[mine[name].dtype] for name, error in errors(mine, theirs).items())
