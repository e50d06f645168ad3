"""Stands for Weights & Biases' client, which tests do without: takes what Megatron logs, and forgets it."""

from typing import Any


class _Anything(dict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        return _Anything()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Anything()


config = run = _Anything()
Artifact = init = log = finish = _Anything()
