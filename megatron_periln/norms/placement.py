"""Where the norms of a transformer stand, as data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_periln.norms.formulas import Place, Value, check, evaluate, names_a_place
from megatron_periln.norms.settings import Norms, NormSettings

__all__ = ["OUTPUT", "PERI", "PLACEMENTS", "POST", "PRE", "NormPlacement", "OutputNormInit", "SublayerRule"]

OutputNormInit = Literal["ones", "depth-scaled"]
Learned = Literal["", "scales", "gates", "gpas"]

_PARAMETERS_PER_NORM = {"RMSNorm": 1, "LayerNorm": 2}

_NO_SETTINGS = Norms()

_OF_A_SUBLAYER = ("input", "output", "after_add", "input_scale", "residual_scale", "output_scale")


@dataclass(frozen=True)
class SublayerRule:
    """What one sublayer ``M`` computes: ``N_after(a x + b N_out(M(s N_in(x))))``, with the norms that it has.

    Attributes
    ----------
    input, output, after_add
        Whether it has ``N_in``, ``N_out`` and ``N_after``.
    input_scale, residual_scale, output_scale
        ``s``, ``a`` and ``b``.
    learned
        What of it is learned, as in `NormPlacement`.
    """

    input: bool
    output: bool
    after_add: bool
    input_scale: float = 1.0
    residual_scale: float = 1.0
    output_scale: float = 1.0
    learned: Learned = ""

    @property
    def adds_plainly(self) -> bool:
        """Whether all after ``M`` is Megatron's own bias-dropout-add."""
        return _adds_plainly(self)


@dataclass(frozen=True, kw_only=True)
class NormPlacement:
    """The one rule of a model's sublayers, `SublayerRule`, and what else decides where its norms stand.

    With ``N`` a norm and ``x`` the residual stream, one sublayer ``M`` computes
    ``N_after(a x + b N_out(M(s N_in(x))))``. `PLACEMENTS` has the named rules, one line each:

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
        A norm on the sublayer's input: everywhere, nowhere, or where a formula of
        `megatron_periln.norms.formulas` is not 0, or a list of numbers. What is no bool counts as true.
    output
        A norm on the sublayer's output, after its bias and before dropout and the residual add; as ``input``.
    after_add
        A norm on the residual stream, after the residual add; as ``input``.
    input_scale, residual_scale, output_scale
        ``s``, ``a`` and ``b``: numbers, formulas or lists.
    learned
        ``"scales"``: ``a`` and ``b`` are parameters of each sublayer, which start at their values.
        ``"gates"``: each channel of a sublayer has its own ``b = sigmoid(g / 0.3)`` and ``a = sqrt(1 - b^2)``
        of a parameter ``g`` that starts at 0, Muse's residual gates.
        ``"gpas"``: the sum is multiplied by ``1 - SiLU(g)`` on the way forward and by 1 on the way back, with
        ``g`` a parameter of each sublayer that starts at 0.
    initial_scale
        By what the initial weights of values, of output projections and of MLPs are multiplied: a formula of
        ``L``. Unless it is 1, output projections start as all other weights do, not at Megatron's
        ``1/sqrt(2 num_layers)`` of that.
    final
        A norm between the last layer and the output projection.
    embedding
        A norm on the embedding, before its dropout.
    norms
        What the norms of each kind have of their own: no weights, an epsilon, zero-centered weights.
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
    input: Value
    output: Value
    after_add: Value
    final: bool
    embedding: bool
    input_scale: Value = 1.0
    residual_scale: Value = 1.0
    output_scale: Value = 1.0
    initial_scale: Value = 1.0
    learned: Learned = ""
    norms: Norms = _NO_SETTINGS
    output_norm_init: OutputNormInit = "ones"
    freeze_output_norm: bool = False
    output_norm_epsilon: float | None = None

    def __post_init__(self) -> None:
        for field in (*_OF_A_SUBLAYER, "initial_scale"):
            try:
                check(getattr(self, field))
            except ValueError as error:
                raise ValueError(f"norm placement {self.name!r}: {field} {error}") from error
        if _goes_by_place(self.initial_scale):
            raise ValueError(
                f"norm placement {self.name!r}: initial_scale is of all layers, a number or a formula of L, "
                f"not {_text(self.initial_scale)}"
            )
        if not self.input and self.input_scale != 1.0:
            raise ValueError(
                f"norm placement {self.name!r} has no input norm to scale; choose pre or peri, or drop the "
                "input scale"
            )
        if self.learned not in ("", "scales", "gates", "gpas"):
            raise ValueError(f"learned is '', 'scales', 'gates' or 'gpas', not {self.learned!r}")
        if self.learned == "gates" and not self.residual_scale == self.output_scale == 1.0:
            raise ValueError(
                f"norm placement {self.name!r}: gates give residual_scale and output_scale; leave these at 1"
            )
        if self.output is True and self.after_add is True:
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
        self._check_norms()

    def _check_norms(self) -> None:
        """Raise a ValueError if norms have settings that are none of this placement's, or twice."""
        output, options = self.norms.output, (self.output_norm_init, self.freeze_output_norm)
        if absent := [kind for kind in self.norms.given() if not getattr(self, kind)]:
            raise ValueError(
                f"norm placement {self.name!r} has no {absent[0].replace('_', ' ')} norm, of which norms has "
                "settings; drop these, or choose another norm placement"
            )
        if not output.weight and options != ("ones", False):
            raise ValueError(
                f"norm placement {self.name!r}: its output norms have no weights to initialize or freeze; "
                "drop --output-norm-init and --freeze-output-norm, or weight: false"
            )
        if output.epsilon is not None and self.output_norm_epsilon is not None:
            raise ValueError(
                f"norm placement {self.name!r}: --output-norm-epsilon and norms both give the output norms' "
                "epsilon; give it once"
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

    def changed(self, changes: Mapping[str, Any]) -> NormPlacement:
        """Return this placement with parts of its rule changed, as flags or a file give them.

        Raises
        ------
        ValueError
            If there is no such part, or it can't be that.
        """
        if unknown := changes.keys() - set(_CHANGEABLE):
            raise ValueError(
                f"a norm rule has no {', '.join(sorted(unknown))}; it has {', '.join(_CHANGEABLE)}"
            )
        values: dict[str, Any] = {f: tuple(v) if isinstance(v, list) else v for f, v in changes.items()}
        for field, value in values.items():
            if field == "norms":
                continue
            if not isinstance(value, bool | int | float | str | tuple) or (
                field == "final" and not isinstance(value, bool)
            ):
                raise ValueError(f"a norm rule's {field} can't be {value!r}")
        if "norms" in values:
            values["norms"] = self._given_norms(values["norms"])
        return replace(self, **values)

    def _given_norms(self, given: Any) -> Norms:
        try:
            return Norms.of(given)
        except ValueError as error:
            raise ValueError(f"norm placement {self.name!r}: {error}") from error

    def changes(self) -> dict[str, Any]:
        """Return what `changed` makes of the placement that has this one's name to get this one."""
        named = PLACEMENTS[self.name]
        mine = {field: getattr(self, field) for field in _CHANGEABLE}
        changed = {field: value for field, value in mine.items() if value != getattr(named, field)}
        return changed if "norms" not in changed else {**changed, "norms": self.norms.given()}

    def at(self, place: Place) -> SublayerRule:
        """Return the rule of one sublayer.

        Raises
        ------
        ValueError
            If it has none there.
        """
        try:
            numbers: dict[str, Any] = {
                field: evaluate(getattr(self, field), place) for field in _OF_A_SUBLAYER
            }
        except ValueError as error:
            raise ValueError(f"norm placement {self.label}: {error}") from error
        norms = {field: bool(numbers.pop(field)) for field in ("input", "output", "after_add")}
        if norms["output"] and norms["after_add"]:
            raise ValueError(
                f"norm placement {self.label}: sublayer {place.sublayer} has two norms after it, not one"
            )
        return SublayerRule(**norms, **numbers, learned=self.learned)

    def rules(self, num_layers: int, hybrid: bool = False) -> list[SublayerRule]:
        """Return the rules of all sublayers, in order; in a ``hybrid`` model each layer is one."""
        layers, kinds = range(1, num_layers + 1), (True,) if hybrid else (True, False)
        return [
            self.at(Place.of_layer(layer, num_layers, kind, hybrid)) for layer in layers for kind in kinds
        ]

    @property
    def same_norms(self) -> bool:
        """Whether every sublayer has the same norms, whatever its scales."""
        return all(isinstance(norm, bool) for norm in (self.input, self.output, self.after_add))

    @property
    def goes_by_depth(self) -> bool:
        """Whether sublayers may differ by their place."""
        return any(_goes_by_place(getattr(self, field)) for field in _OF_A_SUBLAYER)

    @property
    def adds_plainly(self) -> bool:
        """Whether every sublayer's output is added by Megatron's own bias-dropout-add."""
        return _adds_plainly(self)

    @property
    def label(self) -> str:
        """Its name, and what of its rule is another than that name's."""
        changes = (f"{field.replace('_', ' ')} {_text(value)}" for field, value in self.changes().items())
        return ", ".join([self.name, *changes])

    @property
    def without_settings(self) -> NormPlacement:
        """The same placement, with the model's settings for all norms."""
        return replace(self, norms=_NO_SETTINGS)

    def initial_output_weight(self, num_layers: int, hybrid: bool = False) -> float:
        """Return the output norms' initial weight in a model of ``num_layers`` layers.

        In a ``hybrid`` model each sublayer counts as a layer, and two of them make one here.
        """
        depth = num_layers / 2 if hybrid else num_layers
        return depth**-0.5 if self.output_norm_init == "depth-scaled" else 1.0

    def num_parameters(self, num_layers: int, hidden_size: int, normalization: str = "RMSNorm") -> int:
        """Return the parameters that all norms of this placement, and its learned scales, hold together.

        Two sublayers a layer; query and key norms are not counted. ``peri`` has
        ``2 * num_layers * hidden_size`` more than ``pre`` with RMSNorm, and ``hidden_size`` more
        with an embedding norm.
        """
        counts = {
            kind: sum(getattr(rule, kind) for rule in self.rules(num_layers))
            for kind in ("input", "output", "after_add")
        }
        counts |= {"final": self.final, "embedding": self.embedding}
        norms = sum(count for kind, count in counts.items() if getattr(self.norms, kind).weight)
        learned = 2 * num_layers * {"": 0, "scales": 2, "gates": hidden_size, "gpas": 1}[self.learned]
        return norms * hidden_size * _PARAMETERS_PER_NORM[normalization] + learned

    def settings_of(self, kind: str) -> NormSettings:
        """Return what the norms of a kind of `NORM_KINDS` have of their own, with ``output_norm_epsilon``."""
        settings: NormSettings = getattr(self.norms, kind)
        if kind == "output" and settings.epsilon is None:
            return replace(settings, epsilon=self.output_norm_epsilon)
        return settings

    def structure(self) -> str:
        """Return a short text of what decides which model a checkpoint holds: epsilons don't."""
        label = replace(self, norms=self.norms.without_epsilons()).label
        return f"{label} ({'with' if self.embedding else 'without'} embedding norm)"


_CHANGEABLE = (*_OF_A_SUBLAYER, "initial_scale", "learned", "final", "norms")


def _goes_by_place(value: Value) -> bool:
    return isinstance(value, tuple) or (isinstance(value, str) and names_a_place(value))


def _adds_plainly(rule: SublayerRule | NormPlacement) -> bool:
    scales = (rule.residual_scale, rule.output_scale)
    return not (rule.output or rule.after_add or rule.learned) and scales == (1.0, 1.0)


def _text(value: Value | dict[str, Any]) -> str:
    return json.dumps(value) if isinstance(value, tuple | dict) else str(value)


PRE = NormPlacement(name="pre", input=True, output=False, after_add=False, final=True, embedding=False)
POST = NormPlacement(name="post", input=False, output=False, after_add=True, final=False, embedding=False)
PERI = NormPlacement(name="peri", input=True, output=True, after_add=False, final=True, embedding=True)
OUTPUT = NormPlacement(name="output", input=False, output=True, after_add=False, final=True, embedding=True)


def _named_rules() -> Iterator[NormPlacement]:
    """Yield what others have made of these four; docs/rules.md has their sources, and what differs."""

    def rule(name: str, of: NormPlacement, **changes: Any) -> NormPlacement:
        return replace(of, name=name, **changes)

    yield rule("deepnorm", POST, residual_scale="(2 * L) ** 0.25", initial_scale="(8 * L) ** -0.25")
    yield rule("keel", POST, input=True, residual_scale="K")
    yield rule("ln-scaling", PRE, input_scale="1 / sqrt(l)")
    yield rule("mix-ln", PRE, input="l > L / 4", after_add="l <= L / 4")
    yield rule("hybrid-norm", PRE, input=False, after_add="attention")
    yield rule("scaled-peri", PERI, residual_scale="sqrt(k / (k + 1))", output_scale="1 / sqrt(k + 1)")
    yield rule("gated-peri", PERI, learned="gates")
    yield rule("gpas", PRE, learned="gpas")


PLACEMENTS: dict[str, NormPlacement] = {
    placement.name: placement for placement in (PRE, POST, PERI, OUTPUT, *_named_rules())
}
