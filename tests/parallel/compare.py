"""How far two training runs are apart."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Distance:
    """Largest differences over a run.

    ``loss`` and ``grad_norm`` are relative, over all iterations; ``gradients`` is relative to the
    largest gradient of a parameter, over the parameters of the first step; ``weights`` is absolute,
    after the last step.
    """

    loss: float
    grad_norm: float
    gradients: float
    weights: float
    worst_gradient: str

    def exceeds(self, bounds):
        """Return what is larger than ``bounds`` allow, by name."""
        mine = asdict(self)
        return {name: mine[name] for name, bound in bounds.items() if not mine[name] <= bound}


# Relative to one process in fp32: losses and gradient norms over four steps, gradients of the
# first, and weights after the last, where a step moves a weight by up to 1e-3.
FP32 = {"loss": 7e-7, "grad_norm": 2e-6, "gradients": 1e-5, "weights": 7e-6}
# Relative to one process in bf16, whose own rounding is 4e-3.
BF16 = {"loss": 2e-3, "grad_norm": 2e-2, "gradients": 5e-2, "weights": 1e-2}


def bounds(case):
    """Return what ``distance`` may reach for ``case``."""
    return BF16 if "bf16" in case.variant else FP32


def distance(run, reference, first, last):
    """Compare ``run`` with ``reference`` from iteration ``first`` to ``last``."""

    def curve(job, name):
        return {point["iteration"]: point[name] for point in job.curve if first <= point["iteration"] <= last}

    def relative(name):
        mine, theirs = curve(run, name), curve(reference, name)
        assert mine.keys() == theirs.keys() and len(mine) == last - first + 1
        return max(abs(mine[i] - theirs[i]) / abs(theirs[i]) for i in mine)

    gradients = tensors_apart(run.gradients, reference.gradients, relative=True)
    worst = max(gradients, key=gradients.__getitem__)
    weights = tensors_apart(run.weights(last), reference.weights(last), relative=False)
    return Distance(
        relative("lm loss"), relative("grad norm"), gradients[worst], max(weights.values()), worst
    )


def tensors_apart(mine, theirs, relative):
    """Return the largest difference of each tensor; the names and shapes must be the same."""
    assert mine.keys() == theirs.keys(), mine.keys() ^ theirs.keys()
    apart = {}
    for name, tensor in theirs.items():
        assert mine[name].shape == tensor.shape, name
        if tensor.numel() == 0:
            continue
        difference = (mine[name].double() - tensor.double()).abs().max().item()
        scale = tensor.double().abs().max().item() if relative else 1.0
        apart[name] = difference / scale if scale else difference
    return apart
