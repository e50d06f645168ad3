"""What launching again does, on a driver that launches nothing: JSON for tests/norms/test_launching.py.

A script, as the interpreter can't be turned off once Triton is imported.
"""

import contextlib
import gc
import json
import sys
import tempfile
from pathlib import Path

import driver_stand_in

gc.disable()  # or it looks through all that is imported, again and again

import torch  # noqa: E402

folder = tempfile.TemporaryDirectory()
STAND_IN = driver_stand_in.install(Path(folder.name))

import triton  # noqa: E402  after its driver

from megatron_periln.norms.kernels import fused, launching, plans  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32
CASES = {
    "RMSNorm": {"dtype": BF16, "stream": BF16},
    "all": {"dtype": BF16, "stream": FP32, "bias": True, "sublayer_bias": True, "dropout": 0.25},
    "all and next": {"dtype": BF16, "stream": BF16, "bias": True, "sublayer_bias": True, "next": True},
    "gates": {"dtype": BF16, "stream": BF16, "learned": 128},
    # Last, as its sum of scales is another kernel than that of all others.
    "learned": {"dtype": BF16, "stream": BF16, "bias": True, "learned": 1},
}


class Call:
    """The tensors of one call, and its plan."""

    def __init__(
        self, dtype, stream, bias=False, sublayer_bias=False, dropout=0.0, next=False, learned=0, hidden=128
    ):
        def vector(given):
            return torch.ones(hidden, dtype=dtype) if given else None

        shape = (5, 1, hidden)
        self.x, self.residual = torch.ones(shape, dtype=dtype), torch.ones(shape, dtype=stream)
        self.weight = vector(True)
        self.others = (vector(sublayer_bias), vector(bias), vector(next), vector(next and bias))
        self.scales = [torch.ones(learned, dtype=FP32) for _ in range(2 * bool(learned))]
        self.others += (*self.scales,)
        options = (1e-5, 0.0, dropout, *((1e-3, dtype) if next else ()))
        self.plan = fused._plan_for(self.x, self.residual, self.weight, self.others, options)
        self.out = torch.empty_like(self.residual)
        self.normed = torch.empty_like(self.x) if next else None
        self.seed = torch.ones(1, dtype=torch.int64) if dropout else None
        self.statistics = torch.empty(self.plan.statistics_size)
        self.needed = (
            False,
            *(tensor is not None for tensor in (self.x, self.residual, self.weight, *self.others)),
        )
        self.backward = self.plan.backward(self.needed)
        self.grad, self.grad_normed = torch.ones_like(self.out), torch.ones_like(self.x) if next else None
        self.results = torch.empty_like(self.x), torch.empty_like(self.out)
        parameters = len(self.backward.parameters)
        self.partials = torch.empty(self.backward._all_partials)
        self.of_scales = self.partials[self.backward._scale_partials_at :] if learned else None
        self.scale_sums = torch.empty(2 * learned)
        self.sums = torch.empty(parameters * hidden, dtype=dtype)

    def saved(self):
        kept = self.out if self.normed is not None else None
        tensors = (self.x, self.weight, self.statistics, self.others[0], self.seed, kept, self.others[2])
        learned = (self.others[1], self.residual, *self.scales) if self.scales else ()
        return plans.Saved(*tensors, *learned)

    def run(self, what):
        if what == "forward":
            self.plan.forward(
                self.residual, self.others[1], self.others[3], self.saved(), self.out, self.normed
            )
        elif what == "backward":
            gradients = (self.grad, self.grad_normed, *self.results, self.partials)
            self.backward._write(self.saved(), *gradients)
        elif what == "sum":
            self.backward._reduce(self.partials, self.sums)
        else:
            launcher = self.launcher("sum_of_scales")
            self.backward._launch_sum(launcher, self.of_scales, self.scale_sums, self.plan.scale_size)

    def launcher(self, what):
        return getattr(self.plan if what == "forward" else self.backward, f"_{what}")


def compiled(launcher):
    """Return the types of what a kernel is launched on, in order."""
    kernels = [kernel for caches in launcher.kernel.device_caches.values() for kernel in caches[0].values()]
    return [t for t in kernels[-1].src.signature.values() if t != "constexpr"]


def seen(launcher):
    """Return the last launch, its parameters cut to their sizes."""
    launch = STAND_IN.last()
    sizes = [8 if kind[0] == "*" or kind.endswith("64") else 4 for kind in compiled(launcher)]
    values = [v & (2 ** (8 * size) - 1) for v, size in zip(launch["parameters"], sizes, strict=False)]
    return {**launch, "parameters": values}


def watched(call, what):
    """Run, and return how often something was launched, and how last."""
    STAND_IN.watch(1)
    before = STAND_IN.launches
    call.run(what)
    count = STAND_IN.launches - before
    STAND_IN.watch(len(compiled(call.launcher(what))))
    call.run(what)
    return count, seen(call.launcher(what))


def by_names(call, what):
    """Have Triton launch."""
    launcher = call.launcher(what)
    relaunch, launcher.relaunch = launcher.relaunch, None
    attempts, launcher._attempts = launcher._attempts, 0
    result = watched(call, what)
    launcher.relaunch, launcher._attempts = relaunch, attempts
    return result


def same_launches():
    results = {}
    for name, options in CASES.items():
        call = Call(**options)
        for what in ("forward", "backward", "sum", *["sum_of_scales"] * bool(call.scales)):
            triton_s, first = by_names(call, what), watched(call, what)
            again = watched(call, what)
            found = call.launcher(what).relaunch is not None
            results[f"{name}, {what}"] = [found, triton_s == again, first[0], again[1]["parameters"]]
    return results


def calls_of_triton():
    """Return whether Triton itself launched, and launches in all, under each circumstance."""
    call, results = Call(**CASES["RMSNorm"]), {}
    call.run("forward")
    counted = []
    run = triton.JITFunction.run
    triton.JITFunction.run = lambda *args, **kwargs: counted.append(1) or run(*args, **kwargs)

    def note(name):
        counted.clear()
        before = STAND_IN.launches
        call.run("forward")
        results[name] = [len(counted), STAND_IN.launches - before]

    note("like the first")
    STAND_IN.stream = 9
    STAND_IN.watch(1)
    note("on another stream")
    results["on another stream"].append(STAND_IN.last()["stream"])
    STAND_IN.stream = 7
    with changed(STAND_IN, "device", 1):
        note("on another device")
    with changed(call, "residual", torch.ones(5 * 128 + 1, dtype=BF16)[1:].view(5, 1, 128)):
        note("unaligned")
    with changed(call, "x", torch.ones(5, 1, 256, dtype=BF16)[..., :128]):
        note("with other strides")
    told = []
    hook = told.append
    triton.knobs.runtime.launch_enter_hook.add(hook)
    note("watched by a profiler")
    results["watched by a profiler"].append(len(told))
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    note("like the first again")
    return results


def through_autograd():
    """Return launches forward and backward, by number of the call."""
    leaves = [torch.ones(4, 64, dtype=BF16).requires_grad_() for _ in range(2)]
    weight, results = torch.ones(64, dtype=BF16).requires_grad_(), []
    for _ in range(3):
        start = STAND_IN.launches
        out = fused.norm_add(leaves[0], None, leaves[1], weight, None, 1e-5, False, 0.0, True)
        middle = STAND_IN.launches
        torch.autograd.grad(out, [*leaves, weight], torch.ones_like(out))
        results.append([middle - start, STAND_IN.launches - middle])
    return results


def another_triton():
    """Return whether a launch is repeated where Triton gives its C function something else."""
    from triton.backends.nvidia.driver import CudaLauncher

    results = {}
    call_launcher = CudaLauncher.__call__

    def note(name, change):
        fused._plans.clear()
        call = Call(**CASES["RMSNorm"])
        with changed(CudaLauncher, "__call__", change):
            before = STAND_IN.launches
            call.run("forward")
            call.run("forward")
            results[name] = [call.launcher("forward").relaunch is None, STAND_IN.launches - before]

    def twice(self, *args):
        call_launcher(self, *args)
        call_launcher(self, *args)

    note("as it is", call_launcher)
    note("launches twice", twice)
    return results


@contextlib.contextmanager
def changed(thing, name, value):
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)


json.dump(
    {
        "same launches": same_launches(),
        "calls of Triton": calls_of_triton(),
        "through autograd": through_autograd(),
        "another Triton": another_triton(),
        "alignment": launching.ALIGNMENT,
    },
    sys.stdout,
)
