"""``--moe-use-upcycling``: a mixture of experts that starts from a dense checkpoint."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe import upcycling_utils

from megatron_periln.patches.registry import changes

__all__ = ["load_the_dense_model"]


@changes(
    "megatron.core.transformer.moe.upcycling_utils.load_and_upcycle_model",
    why="`setup_model_and_optimizer` gives it the dense model under a name that `load_checkpoint` has no "
    "more, so that `--moe-use-upcycling` ends in a TypeError",
    until="patches/test_upcycling.py::test_upstream_still_loads_the_dense_model_under_another_name",
)
def load_the_dense_model() -> None:
    """Give ``load_checkpoint`` the dense model under the name that it has there."""
    original = upcycling_utils.load_and_upcycle_model

    def load_and_upcycle(*args: Any, load_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        renamed = {("ddp_model" if name == "model" else name): value for name, value in load_kwargs.items()}
        return original(*args, load_kwargs=renamed, **kwargs)

    upcycling_utils.load_and_upcycle_model = load_and_upcycle
