"""Mamba-2's scan and what a gated delta net needs, in plain PyTorch.

On a GPU the packages mamba-ssm, causal-conv1d and flash-linear-attention have kernels for them; these here
have the names, arguments and results of the kernels that Megatron's layers call in training
(megatron/core/ssm/mamba_mixer.py and gated_delta_net/). The scan is "state space duality" in chunks: Dao and
Gu, Transformers are SSMs (arXiv:2405.21060), section 6.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "GatedNorm",
    "causal_conv1d",
    "chunk_scan",
    "gated_delta_rule",
    "install",
    "l2norm",
    "scan",
    "split_conv1d_scan",
]


def install() -> None:
    """Let Megatron's Mamba layers and gated delta nets compute with the functions of this module."""
    # Imports megatron, to which the CPU must stand in for the GPU already.
    from megatron_periln.patches import megatron_on_cpu

    megatron_on_cpu.compute_mamba_layers_with(
        norm=GatedNorm, chunk_scan=chunk_scan, split_conv1d_scan=split_conv1d_scan
    )
    megatron_on_cpu.compute_gated_delta_nets_with(
        causal_conv1d=causal_conv1d, l2norm=l2norm, rule=gated_delta_rule
    )


def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, seq_idx: Tensor | None = None
) -> Tensor:
    """Return ``y_t = C_t h_t`` of the states ``h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t``.

    Within a chunk all pairs of positions are multiplied, as in attention; from chunk to chunk goes a state.

    Parameters
    ----------
    x
        ``[batch, sequence, heads, head]``.
    dt
        Step sizes, ``[batch, sequence, heads]``.
    A
        ``[heads]``, negative.
    B, C
        ``[batch, sequence, groups, state]``; each group serves as many heads as the others.
    chunk_size
        Positions in a chunk.
    seq_idx
        Which document a position is of, ``[batch, sequence]``: each starts with a state of 0.

    Returns
    -------
    Tensor
        ``[batch, sequence, heads, head]``, in the dtype of ``x``; computed in fp32 at least.
    """
    batch, length, heads, head = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    to_heads = heads // B.shape[2]
    B, C = (matrix.to(dtype).repeat_interleave(to_heads, dim=2) for matrix in (B, C))
    dt = dt.to(dtype)
    steps, logs = x.to(dtype) * dt[..., None], dt * A.to(dtype)
    documents = torch.zeros(batch, length, dtype=torch.int32) if seq_idx is None else seq_idx
    state = steps.new_zeros(batch, heads, head, B.shape[-1])
    before = documents[:, :1]
    outputs = []
    for start in range(0, length, chunk_size):
        part = slice(start, start + chunk_size)
        step, b, c, document = steps[:, part], B[:, part], C[:, part], documents[:, part]
        log = logs[:, part].cumsum(1)
        seen = (document[:, :, None] == document[:, None]).tril()[..., None]
        decay = (log[:, :, None] - log[:, None]).masked_fill(~seen, -torch.inf).exp()
        inner = torch.einsum("bihn,bjhn,bijh,bjhp->bihp", c, b, decay, step)
        carried = log.exp() * (document == before)[..., None]
        outputs.append(inner + torch.einsum("bihn,bhpn,bih->bihp", c, state, carried))
        before = document[:, -1:]
        left = (log[:, -1:] - log).exp() * (document == before)[..., None]
        state = carried[:, -1, :, None, None] * state + torch.einsum("bjhn,bjhp,bjh->bhpn", b, step, left)
    return torch.cat(outputs, dim=1).to(x.dtype)


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    return_final_states: bool = False,
    initial_states: Tensor | None = None,
) -> Tensor:
    """Stand in for mamba-ssm's ``mamba_chunk_scan_combined``: the `scan`, with ``D x`` added, times SiLU(z).

    Raises
    ------
    NotImplementedError
        If it is asked for the last state, or given the first: that is generation.
    """
    if return_final_states or initial_states is not None:
        raise NotImplementedError("Mamba layers on the CPU train and evaluate; they don't generate")
    dt = dt if dt_bias is None else dt + dt_bias
    y = scan(x, F.softplus(dt) if dt_softplus else dt, A, B, C, chunk_size, seq_idx)
    if D is not None:
        y = y + x * (D if D.dim() == 2 else D[:, None])
    return (y if z is None else y * F.silu(z)).to(x.dtype)


def split_conv1d_scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    seq_idx: Tensor | None = None,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """Stand in for mamba-ssm's ``mamba_split_conv1d_scan_combined``, without the norm and the projection.

    ``zxbcdt`` is a mixer's input projection, ``[batch, sequence, z + x + B + C + dt]``; the convolution is
    of x, B and C together. Returns ``[batch, sequence, z]``.
    """
    heads = dt_bias.shape[0]
    head = headdim or D.shape[-1]
    inner = heads * head
    z, xbc, dt = zxbcdt.split([inner, zxbcdt.shape[-1] - inner - heads, heads], dim=-1)
    xbc, _ = causal_conv1d(xbc, conv1d_weight, conv1d_bias, activation, seq_idx=seq_idx)
    x, B, C = xbc.split([inner, (xbc.shape[-1] - inner) // 2, (xbc.shape[-1] - inner) // 2], dim=-1)
    y = chunk_scan(
        x.unflatten(-1, (heads, head)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D,
        z.unflatten(-1, (heads, head)),
        dt_bias,
        seq_idx,
        dt_softplus=True,
    )
    return y.flatten(-2)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, None]:
    """Stand in for flash-linear-attention's ``causal_conv1d``: each channel with its own few taps.

    Parameters
    ----------
    x
        ``[batch, sequence, channels]``.
    weight, bias
        ``[channels, taps]``, the last tap for the position itself, and ``[channels]``.
    activation
        None, "silu" or "swish".
    cu_seqlens, seq_idx
        Where documents start and the last one ends, ``[documents + 1]``; or which document a position is of,
        ``[batch, sequence]``. No tap reaches into another one.
    """
    if cu_seqlens is not None:
        seq_idx = _documents(cu_seqlens, x.shape[1])
    taps = weight.shape[-1]
    y = torch.zeros_like(x) if bias is None else bias.to(x.dtype).expand_as(x)
    for back in range(min(taps, x.shape[1])):
        earlier = F.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
        if seq_idx is not None and back:
            same = seq_idx[:, back:] == seq_idx[:, :-back]
            earlier = earlier * F.pad(same, (back, 0))[..., None]
        y = y + weight[:, taps - 1 - back] * earlier
    return (F.silu(y) if activation in ("silu", "swish") else y).to(x.dtype), None


def l2norm(x: Tensor, dim: int = -1, eps: float = 1e-6) -> Tensor:
    """Stand in for flash-linear-attention's ``l2norm``."""
    square = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(dim, keepdim=True)
    return (x * (square + eps).rsqrt()).to(x.dtype)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, None]:
    """Stand in for flash-linear-attention's ``chunk_gated_delta_rule``.

    It is ``o_t = q_t S_t / sqrt(key)`` of the states ``S_t = D_t + beta_t k_t (v_t - k_t D_t)``, with ``D_t =
    exp(g_t) S_(t-1)``, in chunks within which the values are those of a triangular system: Yang, Kautz,
    Hatamizadeh, Gated Delta Networks (arXiv:2412.06464), section 3.3.

    Parameters
    ----------
    q, k, v
        ``[batch, sequence, heads, key]``, the same, and ``[batch, sequence, heads, value]``.
    g, beta
        Logarithms of the decays, and the sizes of the steps: ``[batch, sequence, heads]``.
    cu_seqlens
        Where documents start and the last one ends, ``[documents + 1]``; each starts with a state of 0.

    Returns
    -------
    tuple
        ``[batch, sequence, heads, value]`` in the dtype of ``q``, and None. It is computed in fp64: the
        decays of Megatron's initialization are down to ``exp(-20)``, and fp32 would leave three digits of
        the gradients of what they are made from.

    Raises
    ------
    NotImplementedError
        If it is asked for the last state, or given the first: that is generation.
    """
    if output_final_state or initial_state is not None:
        raise NotImplementedError("gated delta nets on the CPU train and evaluate; they don't generate")
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    batch, length, heads, key = q.shape
    dtype = q.dtype
    documents = torch.zeros(1, length) if cu_seqlens is None else _documents(cu_seqlens, length)
    # [batch, heads, sequence, ...]
    q, k, v, beta, g = (t.double().transpose(1, 2) for t in (q / key**0.5, k, v, beta[..., None], g))
    state = q.new_zeros(batch, heads, key, v.shape[-1])
    before = documents[:, :1]
    outputs = []
    for start in range(0, length, chunk_size):
        part = slice(start, start + chunk_size)
        query, keys, step, document = q[:, :, part], k[:, :, part], beta[:, :, part], documents[:, part]
        log = g[:, :, part].cumsum(-1)
        seen = (document[:, :, None] == document[:, None]).tril()[:, None]
        decay = (log[..., :, None] - log[..., None, :]).masked_fill(~seen, -torch.inf).exp()
        carried = (log.exp() * (document == before)[:, None])[..., None]
        wanted = step * (v[:, :, part] - carried * keys @ state)
        system = (step * (keys @ keys.mT) * decay).tril(-1)
        new = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        outputs.append(carried * query @ state + (query @ keys.mT * decay) @ new)
        before = document[:, -1:]
        left = ((log[..., -1:] - log).exp() * (document == before)[:, None])[..., None]
        state = carried[:, :, -1:] * state + (left * keys).mT @ new
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype), None


def _documents(cu_seqlens: Tensor, length: int) -> Tensor:
    return torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(length), right=True)[None]


class GatedNorm(nn.Module):
    """Stand in for mamba-ssm's gated RMSNorm: ``RMSNorm(x * SiLU(z))`` in groups of channels.

    Parameters
    ----------
    hidden_size
        Channels of this rank.
    eps
        Added to the mean square.
    group_size
        Channels that are normalized together; all by default.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm_before_gate:
            raise NotImplementedError("Megatron's Mamba layers gate before they normalize")
        self.eps = eps
        self.group_size = group_size or hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalize ``x``, ``[..., hidden_size]``, gated by ``z`` if there is one."""
        gated = x if z is None else x * F.silu(z)
        groups = gated.unflatten(-1, (-1, self.group_size)).to(torch.promote_types(x.dtype, torch.float32))
        scale = (groups.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return ((groups * scale).flatten(-2) * self.weight).to(x.dtype)
