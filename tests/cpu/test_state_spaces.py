"""The scan of Mamba layers and what stands beside it, against recurrences written out step by step, fp64."""

import pytest
import torch
import torch.nn.functional as F

from megatron_periln.cpu import state_spaces

BATCH, LENGTH, HEADS, HEAD, GROUPS, STATE = 2, 13, 4, 3, 2, 5
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 6 + [2] * 3, [0] * 13])


def inputs(seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return {
        "x": normal(BATCH, LENGTH, HEADS, HEAD),
        "dt": F.softplus(normal(BATCH, LENGTH, HEADS)),
        "A": -torch.rand(HEADS, generator=draw, dtype=torch.float64) - 0.1,
        "B": normal(BATCH, LENGTH, GROUPS, STATE),
        "C": normal(BATCH, LENGTH, GROUPS, STATE),
    }


def recurrence(x, dt, A, B, C, documents=None):
    outputs = torch.empty_like(x)
    for batch in range(BATCH):
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            state = torch.zeros(HEAD, STATE, dtype=x.dtype)
            for t in range(LENGTH):
                if documents is not None and t and documents[batch, t] != documents[batch, t - 1]:
                    state = torch.zeros_like(state)
                step = dt[batch, t, head]
                state = (step * A[head]).exp() * state
                state = state + step * torch.outer(x[batch, t, head], B[batch, t, group])
                outputs[batch, t, head] = state @ C[batch, t, group]
    return outputs


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "several"])
@pytest.mark.parametrize("chunk_size", [1, 4, 5, 64])
def test_the_scan_is_the_recurrence(chunk_size, documents):
    given = inputs()
    y = state_spaces.scan(**given, chunk_size=chunk_size, seq_idx=documents)
    torch.testing.assert_close(y, recurrence(**given, documents=documents), rtol=1e-12, atol=1e-12)


def test_a_scan_that_knows_of_no_documents_differs():
    given = inputs()
    y = state_spaces.scan(**given, chunk_size=4)
    assert (y - recurrence(**given, documents=DOCUMENTS))[0].abs().max() > 1e-2
    torch.testing.assert_close(y[1], recurrence(**given, documents=DOCUMENTS)[1], rtol=1e-12, atol=1e-12)


def test_the_gradients_of_the_scan():
    given = inputs()
    tensors = [
        tensor[:1, :7].requires_grad_() if tensor.dim() > 1 else tensor.requires_grad_()
        for tensor in given.values()
    ]
    assert torch.autograd.gradcheck(lambda *t: state_spaces.scan(*t, 3, DOCUMENTS[:1, :7]), tensors)


def test_the_dtype_of_the_scan_is_that_of_its_input():
    """And its states are fp32: bfloat16 has 8 bits for a sum of all that came before."""
    given = inputs()
    exact = state_spaces.scan(**given, chunk_size=4)
    y = state_spaces.scan(**{name: t.bfloat16() for name, t in given.items()}, chunk_size=4)
    assert y.dtype is torch.bfloat16
    assert (y - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_convolution_is_torchs(activation, bias):
    draw = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 9, 6, generator=draw), torch.randn(6, 4, generator=draw)
    shift = torch.randn(6, generator=draw) if bias else None
    y, _ = state_spaces.causal_conv1d(x, weight, shift, activation)
    expected = F.conv1d(x.transpose(1, 2), weight[:, None], shift, padding=3, groups=6)[..., :9].transpose(
        1, 2
    )
    torch.testing.assert_close(y, expected if activation is None else F.silu(expected))


def test_a_sequence_shorter_than_the_taps():
    x, weight = torch.ones(1, 2, 1), torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    assert state_spaces.causal_conv1d(x, weight)[0].flatten().tolist() == [1000.0, 1100.0]


def test_the_convolution_stays_within_documents():
    draw = torch.Generator().manual_seed(2)
    x, weight = torch.randn(1, 9, 6, generator=draw), torch.randn(6, 4, generator=draw)
    bounds = torch.tensor([0, 2, 2, 7, 9])
    y, _ = state_spaces.causal_conv1d(x, weight, cu_seqlens=bounds)
    parts = [state_spaces.causal_conv1d(x[:, a:b], weight)[0] for a, b in ((0, 2), (2, 7), (7, 9))]
    torch.testing.assert_close(y, torch.cat(parts, dim=1))
    assert not torch.allclose(y, state_spaces.causal_conv1d(x, weight)[0])


def test_a_whole_mixer_is_its_parts():
    """The fused function of training and the one that `--disable-mamba-mem-eff-path` takes."""
    inner, width = HEADS * HEAD, HEADS * HEAD + 2 * GROUPS * STATE
    draw = torch.Generator().manual_seed(3)
    zxbcdt = torch.randn(BATCH, LENGTH, inner + width + HEADS, generator=draw, dtype=torch.float64)
    weight, shift = (torch.randn(*shape, generator=draw).double() for shape in ((width, 4), (width,)))
    dt_bias, D = (torch.randn(HEADS, generator=draw).double() for _ in range(2))
    A = inputs()["A"]
    y = state_spaces.split_conv1d_scan(
        zxbcdt,
        weight,
        shift,
        dt_bias,
        A,
        D,
        4,
        DOCUMENTS,
        headdim=HEAD,
        ngroups=GROUPS,
        norm_before_gate=False,
    )
    z, xbc, dt = zxbcdt.split([inner, width, HEADS], dim=-1)
    xbc, _ = state_spaces.causal_conv1d(xbc, weight, shift, "silu", seq_idx=DOCUMENTS)
    x, B, C = xbc.split([inner, GROUPS * STATE, GROUPS * STATE], dim=-1)
    x = x.reshape(BATCH, LENGTH, HEADS, HEAD)
    B, C = (matrix.reshape(BATCH, LENGTH, GROUPS, STATE) for matrix in (B, C))
    expected = recurrence(x, F.softplus(dt + dt_bias), A, B, C, DOCUMENTS) + D[:, None] * x
    expected = expected.reshape(BATCH, LENGTH, inner) * F.silu(z)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_generation_is_refused():
    given = inputs()
    with pytest.raises(NotImplementedError, match="they don't generate"):
        state_spaces.chunk_scan(**given, chunk_size=4, return_final_states=True)
    with pytest.raises(NotImplementedError, match="they don't generate"):
        state_spaces.gated_delta_rule(*of_delta_rule(), output_final_state=True)


def test_the_gated_norm_norms_groups():
    draw = torch.Generator().manual_seed(4)
    x, z = torch.randn(2, 3, 8, generator=draw), torch.randn(2, 3, 8, generator=draw)
    norm = state_spaces.GatedNorm(8, eps=1e-5, group_size=4, norm_before_gate=False)
    gated = x * z * z.sigmoid()
    expected = torch.cat([F.rms_norm(part, (4,), eps=1e-5) for part in gated.split(4, dim=-1)], dim=-1)
    torch.testing.assert_close(norm(x, z), expected)
    torch.testing.assert_close(norm(gated), expected)


def test_the_l2_norm():
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(state_spaces.l2norm(x), F.normalize(x, dim=-1))


def delta_rule(q, k, v, g, beta, starts=(0,)):
    y = torch.empty(q.shape, dtype=torch.float64)
    for head in range(HEADS):
        for t in range(LENGTH):
            if t in starts:
                state = torch.zeros(HEAD, HEAD, dtype=torch.float64)
            key, value, query = (tensor[0, t, head].double() for tensor in (k, v, q))
            state = g[0, t, head].double().exp() * state
            state = state + beta[0, t, head] * torch.outer(key, value - key @ state)
            y[0, t, head] = query @ state / HEAD**0.5
    return y


def of_delta_rule(seed=6):
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, LENGTH, HEADS, HEAD, generator=draw).double() for _ in range(3))
    g = -2 * torch.rand(1, LENGTH, HEADS, generator=draw).double()
    return q, state_spaces.l2norm(k), v, g, torch.rand(1, LENGTH, HEADS, generator=draw).double()


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 64])
def test_the_delta_rule_is_its_recurrence(chunk_size):
    given = of_delta_rule()
    y, _ = state_spaces.gated_delta_rule(*given, chunk_size=chunk_size)
    torch.testing.assert_close(y, delta_rule(*given), rtol=1e-12, atol=1e-12)
    bounds = torch.tensor([0, 4, 4, 10, 13])
    y, _ = state_spaces.gated_delta_rule(*given, chunk_size=chunk_size, cu_seqlens=bounds)
    torch.testing.assert_close(y, delta_rule(*given, starts=(0, 4, 10)), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(y, delta_rule(*given), atol=1e-2)


def test_the_gradients_of_the_delta_rule():
    given = [tensor[:, :6].requires_grad_() for tensor in of_delta_rule()]
    assert torch.autograd.gradcheck(lambda *t: state_spaces.gated_delta_rule(*t, chunk_size=4)[0], given)


def test_the_delta_rule_is_megatrons_own_within_fp32():
    from megatron.core.ssm.gated_delta_net import common

    q, k, v, g, beta = (tensor.float() for tensor in of_delta_rule())
    y, _ = state_spaces.gated_delta_rule(q, k, v, g, beta)
    theirs, _ = common.torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta)
    torch.testing.assert_close(y, theirs, rtol=1e-5, atol=1e-5)
