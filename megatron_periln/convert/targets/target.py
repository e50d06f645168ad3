"""What a target is: an architecture of transformers, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Mixture", "Target"]

_NONE: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The mixtures of experts of an architecture: what routes to them, and the names of their settings.

    Parameters
    ----------
    score
        What the router's scores are: ``"softmax"`` over all experts, or each expert's ``"sigmoid"``.
    count, width
        The settings that hold the number of experts and the hidden size of each.
    normalized
        The setting by which the chosen experts' scores add up to 1; or True where they always do.
    bias
        A bias is added to the scores for the choice of experts.
    logit_bias
        A bias is added to what scores are made of, for the choice of experts; Megatron has none such.
    groups
        The settings for the number of groups of experts, and how many of them a token chooses from.
    scale
        The setting for a factor of the scores.
    shared_width
        The setting for the hidden size of the shared expert.
    shared_count
        The setting for their number, each as wide as an expert.
    shared_switch
        A gate switches the shared expert.
    first_dense
        The setting for the number of layers at the start that have none.
    dense_layers
        The setting for the list of layers that have none.
    """

    score: str
    count: str
    width: str = "moe_intermediate_size"
    normalized: str | bool = True
    bias: bool = False
    logit_bias: bool = False
    groups: tuple[str, str] | None = None
    scale: str | None = None
    shared_width: str | None = None
    shared_count: str | None = None
    shared_switch: bool = False
    first_dense: str | None = None
    dense_layers: str | None = None

    @property
    def sizes(self) -> tuple[str, str, str]:
        """The settings for the number of experts, the hidden size of each, and how many a token chooses."""
        return self.count, self.width, "num_experts_per_tok"

    @property
    def shares(self) -> bool:
        """Tell whether each layer has a shared expert."""
        return self.shared_width is not None or self.shared_count is not None


@dataclass(frozen=True, kw_only=True)
class Target:
    """An architecture of transformers: what it can express, its configuration, its tensors' names.

    Parameters
    ----------
    name
        The value of ``--target``; also ``model_type`` in the configuration.
    architecture
        The class in transformers.
    runs_in
        Where it runs without code of its own.
    placement
        The norm placement that it computes.
    qk_norm
        It norms each head's queries and keys: yes, no, or as a setting of this name says.
    whole_qk_norm
        It norms them over all heads together.
    bias_switches
        Settings of the configuration, and the biases that each switches on.
    interleaved
        Its rotary pairs are neighbours.
    partial_rotary
        A share of each head's channels may rotate.
    divided_heads
        The hidden size must be divisible by the number of heads.
    whole_heads
        Its heads are of the hidden size together.
    gate
        A gate of each channel, by the sigmoid of a projection, multiplies what attention gives.
    layer_kinds
        Where positions rotate, if layers may have a window: ``"rotates everywhere"``, ``"rotates in
        windows"`` only, or ``"rotates in windows, if there are"`` any. None if no layer has a window.
    window_period
        The setting for which one of so many layers has no window.
    embedding_norm
        It has an embedding norm, and needs one. Without it, the norm is folded into the table.
    mixture
        Its mixtures of experts, if it has them.
    names
        From the neutral name of a module (see ``weights``) to the architecture's; ``{layer}`` stands for
        the layer's index, ``{next}`` for that of the layer after it, ``{expert}`` for the expert's. A neutral
        name that starts with ``last.`` is that of the last layer. What is no module's weight or bias has its
        whole name.
    in_memory
        Parts of the tensors' names in files, and what transformers has for them in memory, if that is another
        name. Folders have these names if they were written with ``save_original_format=False``.
    zeros
        Tensors of zeros beside: names, and their rows of ``hidden_size``.
    settings
        Further settings of the configuration.
    num_layers_settings
        Those whose value is the number of layers.
    layer_settings
        Settings that are a list with one value a layer.
    rope_labels
        The keys under which the configuration nests its rotary parameters, if it does.
    eps_name
        The setting that holds the norms' epsilon.
    multipliers
        Settings that scale what the model computes, and the attribute of `Architecture` that each is.
    root_scale
        The setting that multiplies embeddings with the square root of the hidden size.
    no_eos
        The value of ``eos_token_id`` for none: null, but where the configuration takes null for ids of its
        own.
    """

    name: str
    architecture: str
    runs_in: str
    placement: str
    qk_norm: bool | str = False
    whole_qk_norm: bool = False
    bias_switches: Mapping[str, frozenset[str]] = field(default_factory=dict)
    interleaved: bool = False
    partial_rotary: bool = False
    divided_heads: bool = False
    whole_heads: bool = False
    gate: bool = False
    layer_kinds: str | None = None
    window_period: str | None = None
    embedding_norm: bool = False
    mixture: Mixture | None = None
    names: Mapping[str, str]
    in_memory: Mapping[str, str] = field(default_factory=dict)
    zeros: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_layers_settings: tuple[str, ...] = ()
    layer_settings: Mapping[str, Any] = field(default_factory=dict)
    rope_labels: tuple[str, ...] = ()
    eps_name: str = "rms_norm_eps"
    multipliers: Mapping[str, str] = field(default_factory=dict)
    root_scale: str | None = None
    no_eos: list[int] | None = None

    @property
    def biases(self) -> frozenset[str]:
        """The biases that it can have."""
        return _NONE.union(*self.bias_switches.values())

    def tensor_name(self, parameter: str, layer: int = 0, num_layers: int = 0, expert: int = 0) -> str:
        """Return the name of a parameter's tensor, such as that of ``attention.q.weight`` in layer 3."""
        if parameter in self.names:
            return self.names[parameter].format(layer=layer)
        module, _, kind = parameter.rpartition(".")
        if layer == num_layers - 1:
            module = f"last.{module}" if f"last.{module}" in self.names else module
        return f"{self.names[module].format(layer=layer, next=layer + 1, expert=expert)}.{kind}"
