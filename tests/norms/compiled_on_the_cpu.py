"""What torch.compile makes of the norms on a CPU: JSON for the tests of this folder.

A script, as the tests' process interprets Triton's kernels, and torch.compile does nothing in it. One for all
of them, as importing costs most of its time.
"""

import gc
import json
import shutil

gc.disable()  # or it looks through all that is imported, again and again

import torch  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from megatron_periln.norms import kernels  # noqa: E402
from megatron_periln.norms.kernels import reference  # noqa: E402
from megatron_periln.norms.kernels.compiled import compile_for_both_passes  # noqa: E402

DROPOUT = 0.3


def gradients(function, recompute):
    generator = torch.Generator().manual_seed(1)
    output, residual = (torch.randn(6, 2, 16, generator=generator).requires_grad_() for _ in range(2))
    weight = torch.nn.Parameter(torch.ones(16))
    masks = []

    def add(output, residual):
        out = function(output, None, residual, weight, None, 1e-5, False, DROPOUT, True)
        masks.append((out == residual).detach())
        return out * out

    torch.manual_seed(5)
    first = checkpoint(add, output, residual, use_reentrant=True) if recompute else add(output, residual)
    second = add(first, residual)  # so that what the first computed matters
    second.sum().backward()
    return [output.grad, residual.grad, weight.grad], masks


def compare(compile_it):
    torch._dynamo.reset()
    (plain, _), (again, masks) = (gradients(compile_it(reference.norm_add), r) for r in (False, True))
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(again, plain, strict=True))
    return {"error": error, "same_mask": torch.equal(masks[0], masks[-1])}


def graphs(compile_it):
    torch._dynamo.reset()
    made = []
    function = compile_it(reference.norm_add, lambda graph, _: made.append(graph) or graph)
    gradients(function, True)
    with torch.no_grad():
        x, weight = torch.ones(6, 2, 16), torch.nn.Parameter(torch.ones(16))
        out = function(x, None, x, weight, None, 1e-5, False, DROPOUT, True)
    return {"made": len(made), "kept": out.requires_grad}


def plainly(specification, backend="inductor"):
    return torch.compile(specification, backend=backend)


def refusal():
    """Return why Triton's kernels are not taken."""
    try:
        kernels.choose_backend("triton", "cpu", 8)
    except ValueError as error:
        return str(error)


def differences():
    """Return how far each function compiled as one graph is from itself."""
    torch.manual_seed(1)
    shapes = ((6, 8), (8,), (6, 8), (8,), (8,))
    sublayer_output, sublayer_bias, residual, weight, bias = (torch.randn(*shape) for shape in shapes)
    found = []
    for function in (reference.norm_add, reference.add_norm):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        arguments = (sublayer_output, sublayer_bias, residual, weight, bias, 1e-5, True, 0.0, True)
        found.append((compiled(*arguments) - function(*arguments)).abs().max().item())
    return found


def both_passes():
    found = {"graphs": graphs(compile_for_both_passes), "graphs_plainly": graphs(plainly)}
    torch._dynamo.config.recompile_limit = 1
    return found | {"limited": compare(compile_for_both_passes), "limited_plainly": compare(plainly)}


result = {"refusal": refusal(), "differences": differences()}
if shutil.which("g++"):
    result["both passes"] = both_passes()
print(json.dumps(result))
