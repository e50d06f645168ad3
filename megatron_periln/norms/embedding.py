"""The embedding norm: the residual stream starts at ``N(embedding)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_periln.norms.modules import Norm
from megatron_periln.norms.settings import MODELS, NormSettings
from megatron_periln.patches.transformer_layers import wrap_embedding_reads

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

    def __init__(self, config: TransformerConfig, settings: NormSettings = MODELS) -> None:
        super().__init__(config, settings=settings)
        self.bypassed = False

    def attach(self, model: GPTModel | HybridModel) -> None:
        """Add this norm to ``model.embedding``, and let the layers of ``model.mtp`` read past it."""
        model.embedding.add_module("norm", self)
        model.embedding.embedding_dropout.register_forward_pre_hook(self._before_dropout)
        if getattr(model, "mtp", None) is None:
            return
        for layer in model.mtp.layers:
            wrap_embedding_reads(layer, self._bypass)

    def _before_dropout(self, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return args if self.bypassed else (self(args[0]),)

    def _bypass(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.bypassed = True
        try:
            return function(*args, **kwargs)
        finally:
            self.bypassed = False
