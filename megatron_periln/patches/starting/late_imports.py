"""What Megatron and torch import in every process, and few need, is imported when it is needed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from megatron_periln.patches.registry import changes

__all__ = ["leave_transformers_out", "step_without_dynamo"]

_TRANSFORMERS = ("transformers", "transformers.utils", "transformers.utils.chat_template_utils")


@changes(
    "megatron.core.tokenizers.text.libraries.huggingface_tokenizer.AutoTokenizer",
    "megatron.core.tokenizers.text.libraries.chat_template._compile_jinja_template",
    "megatron.core.tokenizers.text.libraries.sft_tokenizer.transformers",
    "megatron.core.tokenizers.vision.libraries.multimodal_tokenizer.transformers",
    why="its tokenizers import transformers in every process, whatever the tokenizer: 0.8 s",
    until="patches/test_late_imports.py::test_upstream_still_imports_transformers_for_any_tokenizer",
)
@contextmanager
def leave_transformers_out() -> Iterator[None]:
    """Let what is imported in here find transformers there, and import it when it asks it for something.

    Nothing is changed where transformers is imported already, or is not installed.
    """
    if "transformers" in sys.modules or importlib.util.find_spec("transformers") is None:
        yield
        return
    import megatron.core  # noqa: F401  # not at the top: a launcher has no use for it, 1 s; not in here either

    stand_ins = {name: _StandIn(name) for name in _TRANSFORMERS}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
            module.__dict__["_importing"] = False


class _StandIn(ModuleType):
    """A module that is imported when an attribute is asked for, but for the statement that imports it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._importing = True
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if self._importing:
            return _Late(self.__name__, name)
        return getattr(importlib.import_module(self.__name__), name)


class _Late:
    """An attribute of a module that is imported when the attribute is called, or asked for one of its own."""

    def __init__(self, module: str, name: str) -> None:
        self.__dict__["_get"] = functools.cache(lambda: getattr(importlib.import_module(module), name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._get()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._get(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._get(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._get(), name)


@changes(
    "torch.optim.Optimizer.__init__",
    "torch.optim.Adam.step",
    why="an optimizer imports `torch._dynamo` and with it the compiler, 0.5 s, to say that its methods are "
    "not to be compiled. Where nothing is compiled, there is no one to say it to",
    until="patches/test_late_imports.py::test_upstream_still_imports_dynamo_with_the_first_optimizer",
)
def step_without_dynamo() -> None:
    """Let the methods of torch's optimizers call their functions as they are, where nothing is compiled."""
    for method in vars(Optimizer).values():
        if _is_from(method, "torch/_compile.py"):
            method.__wrapped__.__dict__["__dynamo_disable"] = method.__wrapped__
    for kind in vars(torch.optim).values():
        is_optimizer = isinstance(kind, type) and issubclass(kind, Optimizer)
        step: Any = vars(kind).get("step") if is_optimizer else None
        if _is_from(step, "torch/optim/optimizer.py") and step.__code__.co_name == "_use_grad":
            kind.step = _with_grad_as_declared(step.__wrapped__)


def _is_from(function: Any, file: str) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.endswith(file)


def _with_grad_as_declared(step: Callable[..., Any]) -> Callable[..., Any]:
    """Do what ``_use_grad_for_differentiable`` does, without its marks for the compiler."""

    @functools.wraps(step)
    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = torch.is_grad_enabled()
        try:
            torch.set_grad_enabled(self.defaults["differentiable"])
            return step(self, *args, **kwargs)
        finally:
            torch.set_grad_enabled(before)

    return stepped
