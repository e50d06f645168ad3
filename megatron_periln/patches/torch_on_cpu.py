"""What is changed in torch to run Megatron on the CPU, beside what ``"cuda"`` means (megatron_periln/cpu)."""

from __future__ import annotations

from typing import Any

import torch

from megatron_periln.patches.registry import changes

__all__ = ["compile_nothing", "install", "keep_data_loaders_off_the_device_generator"]


def install() -> None:
    """Install it, before megatron is imported."""
    compile_nothing()
    keep_data_loaders_off_the_device_generator()


@changes(
    "torch.compile",
    why="Megatron decorates functions with it while it is being imported (megatron/core/jit.py, "
    "moe/router.py), before any flag could say otherwise; compiling them would need a C++ "
    "toolchain and minutes for what runs in milliseconds",
    until="patches/test_torch_on_cpu.py::test_upstream_still_compiles_while_being_imported",
)
def compile_nothing() -> None:
    """Let ``torch.compile`` return its argument."""

    def compile(model: Any = None, **_: Any) -> Any:
        return (lambda function: function) if model is None else model

    torch.compile = compile


@changes(
    "torch.utils.data.DataLoader.__init__",
    why="a loader draws a seed from the CPU's generator whenever it is iterated. Here that generator "
    "is the device's too, which Megatron restores before it builds its loaders: the draw would "
    "change what dropout does after a resume",
    until="patches/test_torch_on_cpu.py::test_upstream_still_draws_from_the_cpu_generator_in_data_loaders",
)
def keep_data_loaders_off_the_device_generator() -> None:
    """Give each data loader a generator of its own."""
    init = torch.utils.data.DataLoader.__init__

    def with_own_generator(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("generator") is None:
            kwargs["generator"] = torch.Generator().manual_seed(torch.initial_seed())
        init(self, *args, **kwargs)

    torch.utils.data.DataLoader.__init__ = with_own_generator  # type: ignore[method-assign]
