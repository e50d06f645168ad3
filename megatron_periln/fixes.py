"""Faults of megatron-core 0.19 that stand in the way, mended one function each.

Each says what goes wrong and where upstream; its test in tests/test_fixes.py fails once upstream
has mended it. All act on any device.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["apply"]

_applied = False


def use_prebuilt_dataset_helpers() -> None:
    """Skip compiling the dataset helpers.

    ``compile_helpers`` (megatron/core/datasets/utils.py) runs ``make`` in the package's folder and
    exits the process if that fails. The wheel ships the compiled module, and no Makefile.
    """
    import megatron.core.datasets.helpers_cpp  # noqa: F401
    import megatron.core.datasets.utils as utils

    utils.compile_helpers = lambda: None


def checkpoint_without_output_off_fp8() -> None:
    """Keep ``CheckpointWithoutOutput(fp8=False)`` off the FP8 path.

    It tests ``fp8 is not None`` (megatron/core/tensor_parallel/random.py), so False means FP8,
    which needs Transformer Engine: selective recomputation of norms fails without it.
    """
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    init = CheckpointWithoutOutput.__init__

    def with_false_as_none(self: Any, fp8: Any = None) -> None:
        init(self, fp8 or None)

    CheckpointWithoutOutput.__init__ = with_false_as_none


def materialize_adam_state() -> None:
    """Let the distributed optimizer describe Adam's state before the first step.

    Without Transformer Engine and Apex, ``DistributedOptimizer.state_dict``
    (megatron/core/optimizer/distrib_optimizer.py) expects a ``step`` in every parameter's state,
    which torch's Adam creates in its first step only: loading a checkpoint fails.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer_class = distrib_optimizer.DistributedOptimizer
    state_dict = optimizer_class.state_dict

    def with_state(self: Any) -> Any:
        inner = self.optimizer
        if isinstance(inner, torch.optim.Adam | torch.optim.AdamW) and not inner.state:
            for group in inner.param_groups:
                for parameter in group["params"]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return state_dict(self)

    optimizer_class.state_dict = with_state


def keep_adam_steps_apart() -> None:
    """Restore one ``step`` per parameter.

    ``DistributedOptimizer.load_state_dict`` gives all parameters the same ``step`` tensor, which
    torch's Adam then increments once per parameter: a resumed run diverges silently. The loaders
    of resharded state moreover copy every entry of the state, ``step`` included, from a checkpoint
    that keeps ``step`` elsewhere, and raise ``KeyError``.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer_class = distrib_optimizer.DistributedOptimizer
    load_state_dict = optimizer_class.load_state_dict
    set_states = optimizer_class._set_main_param_and_optimizer_states

    def with_own_steps(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    def without_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        set_states(self, model_param, {"step": None, **tensors})

    optimizer_class.load_state_dict = with_own_steps
    optimizer_class._set_main_param_and_optimizer_states = without_step


def apply() -> None:
    """Mend them all, once."""
    global _applied
    if _applied:
        return
    _applied = True
    use_prebuilt_dataset_helpers()
    checkpoint_without_output_off_fp8()
    materialize_adam_state()
    keep_adam_steps_apart()
