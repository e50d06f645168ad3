"""Where the norms of a transformer stand, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["OUTPUT", "PERI", "PLACEMENTS", "POST", "PRE", "NormPlacement", "OutputNormInit"]

OutputNormInit = Literal["ones", "depth-scaled"]

_PARAMETERS_PER_NORM = {"RMSNorm": 1, "LayerNorm": 2}


@dataclass(frozen=True, kw_only=True)
class NormPlacement:
    """Which norms surround the sublayers ``M`` of a transformer, and how output weights start.

    With ``N`` a norm and ``x`` the residual stream, one sublayer computes

    ========  =======================  =========================================
    name      sublayer                 also known as
    ========  =======================  =========================================
    pre       ``x + M(N(x))``          Pre-LN
    post      ``N(x + M(x))``          Post-LN
    peri      ``x + N(M(N(x)))``       Peri-LN; sandwich norm
    output    ``x + N(M(x))``          output-only, the order of OLMo 2
    ========  =======================  =========================================

    Parameters
    ----------
    name
        The value of ``--norm-placement``.
    input
        A norm on the sublayer's input.
    output
        A norm on the sublayer's output, after its bias and before dropout and the residual add.
    after_add
        A norm on the residual stream, after the residual add.
    final
        A norm between the last layer and the output projection.
    embedding
        A norm on the embedding, before its dropout.
    output_norm_init
        Output norms' weights start at 1 (``"ones"``) or at ``1/sqrt(num_layers)`` (``"depth-scaled"``,
        the initialization of Pangu Ultra, arXiv 2504.07866).
    freeze_output_norm
        Keep the output norms' parameters at their initial values.
    output_norm_epsilon
        Epsilon of the output norms; None takes the model's ``layernorm_epsilon``.

    Notes
    -----
    Placements and the embedding norm follow Kim et al., "Peri-LN: Revisiting Normalization Layer
    in the Transformer Architecture", ICML 2025 (arXiv 2502.02732), section 3.
    """

    name: str
    input: bool
    output: bool
    after_add: bool
    final: bool
    embedding: bool
    output_norm_init: OutputNormInit = "ones"
    freeze_output_norm: bool = False
    output_norm_epsilon: float | None = None

    def __post_init__(self) -> None:
        if self.output and self.after_add:
            raise ValueError(f"norm placement {self.name!r}: a sublayer has one norm after it, not two")
        if self.output_norm_init not in ("ones", "depth-scaled"):
            raise ValueError(f"output_norm_init is 'ones' or 'depth-scaled', not {self.output_norm_init!r}")
        if self.output_norm_epsilon is not None and not self.output_norm_epsilon > 0:
            raise ValueError(f"output_norm_epsilon must be positive, not {self.output_norm_epsilon}")
        if not self.output and (self.output_norm_init, self.freeze_output_norm, self.output_norm_epsilon) != (
            "ones",
            False,
            None,
        ):
            raise ValueError(
                f"norm placement {self.name!r} has no output norm to initialize, freeze or give an "
                "epsilon; choose peri or output, or drop the output-norm options"
            )

    @staticmethod
    def named(name: str) -> NormPlacement:
        """Return the placement called ``name``.

        Raises
        ------
        ValueError
            If there is none; the message lists those there are.
        """
        try:
            return PLACEMENTS[name]
        except KeyError:
            raise ValueError(
                f"unknown norm placement {name!r}; choose from {', '.join(PLACEMENTS)}"
            ) from None

    def with_options(
        self,
        *,
        embedding: bool | None = None,
        output_norm_init: OutputNormInit = "ones",
        freeze_output_norm: bool = False,
        output_norm_epsilon: float | None = None,
    ) -> NormPlacement:
        """Return this placement with the given options; ``embedding=None`` keeps its default."""
        return replace(
            self,
            embedding=self.embedding if embedding is None else embedding,
            output_norm_init=output_norm_init,
            freeze_output_norm=freeze_output_norm,
            output_norm_epsilon=output_norm_epsilon,
        )

    def initial_output_weight(self, num_layers: int, hybrid: bool = False) -> float:
        """Return the output norms' initial weight in a model of ``num_layers`` layers.

        In a ``hybrid`` model each sublayer counts as a layer, and two of them make one here.
        """
        depth = num_layers / 2 if hybrid else num_layers
        return depth**-0.5 if self.output_norm_init == "depth-scaled" else 1.0

    def num_parameters(self, num_layers: int, hidden_size: int, normalization: str = "RMSNorm") -> int:
        """Return the parameters that all norms of this placement hold together.

        Two sublayers a layer; query and key norms are not counted. ``peri`` has
        ``2 * num_layers * hidden_size`` more than ``pre`` with RMSNorm, and ``hidden_size`` more
        with an embedding norm.
        """
        per_sublayer = self.input + self.output + self.after_add
        norms = 2 * num_layers * per_sublayer + self.final + self.embedding
        return norms * hidden_size * _PARAMETERS_PER_NORM[normalization]

    def structure(self) -> str:
        """Return a short text of what decides which parameters a checkpoint holds."""
        return f"{self.name} ({'with' if self.embedding else 'without'} embedding norm)"


PRE = NormPlacement(name="pre", input=True, output=False, after_add=False, final=True, embedding=False)
POST = NormPlacement(name="post", input=False, output=False, after_add=True, final=False, embedding=False)
PERI = NormPlacement(name="peri", input=True, output=True, after_add=False, final=True, embedding=True)
OUTPUT = NormPlacement(name="output", input=False, output=True, after_add=False, final=True, embedding=True)

PLACEMENTS: dict[str, NormPlacement] = {placement.name: placement for placement in (PRE, POST, PERI, OUTPUT)}
