"""The embedding norm: the residual stream starts at ``N(embedding)``."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_periln.norms.norm import Norm

__all__ = ["EmbeddingNorm"]


class EmbeddingNorm(Norm):
    """A norm between Megatron's embedding and the embedding's dropout.

    Standing there, it sees the tokens that a sequence-parallel rank owns, in the residual
    stream's dtype, and dropout acts on normalized values. Its parameters are
    ``embedding.norm.weight`` (and ``.bias``) of the first pipeline stage.

    Multi-token prediction reads the embedding too, through a norm of its own (``enorm``), on
    whichever stage it runs. It reads the embedding without this norm, so that this norm's
    parameters exist on one stage only.

    Examples
    --------
    >>> EmbeddingNorm(config).attach(model)
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.bypassed = False

    def attach(self, model: GPTModel | HybridModel) -> None:
        """Add this norm to ``model.embedding``, and let ``model.mtp`` read past it."""
        model.embedding.add_module("norm", self)
        model.embedding.embedding_dropout.register_forward_pre_hook(self._before_dropout)
        if getattr(model, "mtp", None) is not None:
            model.mtp.register_forward_pre_hook(self._before_mtp, with_kwargs=True)

    def _before_dropout(self, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return args if self.bypassed else (self(args[0]),)

    def _before_mtp(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "embedding": partial(self._bypass, kwargs["embedding"])}

    def _bypass(self, embedding: nn.Module, **inputs: Tensor) -> Tensor:
        self.bypassed = True
        try:
            return embedding(**inputs)
        finally:
            self.bypassed = False
