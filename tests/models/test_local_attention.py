"""Our attention sees what the causal mask, the window and the documents leave, however it is spread."""

import itertools

import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_periln.models import local_attention
from megatron_periln.models.attention_masks import fold_masks
from megatron_periln.models.local_attention import LocalAttention
from tests.models import small

pytestmark = pytest.mark.usefixtures("single_process")

BATCH, SEQUENCE, HEADS, CHANNELS = 2, 16, 4, 8
WINDOWS = [None, (0, 0), (3, 0), (3, -1), (5, 2), (-1, 0), (SEQUENCE, 0)]
END = 9
DOCUMENTS = [
    torch.randint(0, 9, (SEQUENCE,), generator=torch.Generator().manual_seed(3)) for _ in range(BATCH)
]
for text, ends in zip(DOCUMENTS, ([2, 9], [0, 6, 7]), strict=True):
    text[ends] = END
TOLERANCE, MISTAKE = 2e-6, 1e-2


class Chunks:
    """A context-parallel group of ``size`` ranks in one process: what each holds of ``[sequence, ...]``."""

    def __init__(self, size):
        self.parts, self.current = size, 0

    def size(self):
        return self.parts

    def rank(self):
        return self.current

    def of(self, tensor, dim=0):
        """Return what each rank holds, as ``get_batch_on_this_cp_rank`` deals it out."""
        chunks = tensor.chunk(2 * self.parts, dim)
        return [torch.cat([chunks[i], chunks[-1 - i]], dim) for i in range(self.parts)]


def module(window=None, kind="vanilla", groups=HEADS, number=1, **changes):
    config = small.transformer_config(
        num_query_groups=groups, window_size=window, softmax_type=kind, kv_channels=CHANNELS, **changes
    )
    built = LocalAttention(
        config, number, AttnMaskType.causal, "self", pg_collection=small.groups(), cp_comm_type=None
    )
    if built.softmax_offset is not None:
        with torch.no_grad():
            built.softmax_offset.copy_(torch.linspace(-1, 2, HEADS))
    return built


def document_mask():
    """Return the mask that Megatron's dataset gives with ``--reset-attention-mask``."""
    return torch.stack(
        [_get_ltor_masks_and_position_ids(text, END, False, True, False, True)[0] for text in DOCUMENTS]
    )


def attend(built, monkeypatch, query, key, value, mask, size):
    """Return ``[sequence, batch, hidden]`` of attention whose sequence ``size`` ranks share."""
    if size == 1:
        return built(query, key, value, mask)
    built.cp_group = group = Chunks(size)
    outputs = []
    masks = [None] * size if mask is None else group.of(mask, dim=2)
    for group.current in range(size):
        gathered = (torch.cat(group.of(tensor)) for tensor in (key, value))
        monkeypatch.setattr(
            local_attention,
            "gather_from_sequence_parallel_region",
            lambda *_, gathered=gathered, **__: next(gathered),
        )
        own = (group.of(tensor)[group.current] for tensor in (query, key, value))
        outputs.append(built(*own, masks[group.current]))
    order = torch.cat(group.of(torch.arange(SEQUENCE)))
    return torch.cat(outputs)[order.argsort()]


def hidden(i, j, row, window, documents):
    """Tell whether token ``i`` of a row must not see token ``j``: the definition, one pair at a time."""
    left = -1 if window is None else window[0]
    across = documents and END in DOCUMENTS[row][j:i].tolist()
    return j > i or (left >= 0 and i - j > left) or across


def dense(query, key, value, window, documents, offset):
    """Attention in fp64, of every pair of tokens."""
    repeats = HEADS // key.size(2)
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    pairs = itertools.product(range(BATCH), range(SEQUENCE), range(SEQUENCE))
    mask = torch.tensor([hidden(i, j, row, window, documents) for row, i, j in pairs])
    scores = (q @ k.mT / CHANNELS**0.5).masked_fill(mask.view(BATCH, 1, SEQUENCE, SEQUENCE), -torch.inf)
    if offset is not None:
        sink = offset.view(1, HEADS, 1, 1).expand(BATCH, -1, SEQUENCE, 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., :SEQUENCE]
    return (weights @ v).permute(2, 0, 1, 3).flatten(2)


def tensors(groups, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    sizes = (HEADS, groups, groups)
    made = [2 * torch.randn(SEQUENCE, BATCH, size, CHANNELS, generator=generator) for size in sizes]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def worst_error(built, monkeypatch, window, documents, size, groups, mask):
    """Return the largest error of the output and of any gradient, relative to the largest value of each."""
    ours, theirs = tensors(groups), tensors(groups, torch.float64)
    offset = built.softmax_offset
    learned = [] if offset is None or not offset.requires_grad else [offset]
    exact = None if offset is None else offset.detach().double().requires_grad_()
    output = attend(built, monkeypatch, *ours, mask, size)
    expected = dense(*theirs, window, documents, exact)
    factor = torch.randn(output.shape, generator=torch.Generator().manual_seed(8))
    gradients = torch.autograd.grad(output, [*ours, *learned], factor)
    exact_gradients = torch.autograd.grad(expected, [*theirs, *([exact] if learned else [])], factor.double())
    pairs = zip((output, *gradients), (expected, *exact_gradients), strict=True)
    return max(small.relative_error(mine, right) for mine, right in pairs)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4], ids="CP{}".format)
def test_attention_is_dense_attention_under_all_masks(monkeypatch, window, documents, size):
    """With sinks and without, and with as many keys as queries or fewer."""
    mask = document_mask() if documents else None
    for kind, groups in itertools.product(("vanilla", "off-by-one", "learnable"), (4, 2, 1)):
        built = module(window, kind, groups)
        error = worst_error(built, monkeypatch, window, documents, size, groups, mask)
        assert error < TOLERANCE, (kind, groups)


def test_the_comparison_notices_a_mask_that_is_dropped(monkeypatch):
    for window, documents, kept in (((3, 0), True, (None, True)), ((3, 0), True, ((3, 0), False))):
        built = module(kept[0])
        mask = document_mask() if kept[1] else None
        for size in (1, 2):
            assert worst_error(built, monkeypatch, window, documents, size, HEADS, mask) > MISTAKE


def test_upstream_still_drops_the_mask_where_there_is_a_window():
    """Once it does not, windows need no attention of ours."""
    config = small.transformer_config(num_query_groups=HEADS, window_size=(SEQUENCE, 0), kv_channels=CHANNELS)
    stock = DotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=small.groups())
    query, key, value = tensors(HEADS)
    assert torch.equal(stock(query, key, value, document_mask()), stock(query, key, value, None))


def test_without_documents_a_window_is_stock_megatron_s_bit_for_bit():
    ours = module((3, 0))
    stock = DotProductAttention(ours.config, 1, AttnMaskType.causal, "self", pg_collection=small.groups())
    assert torch.equal(ours(*tensors(HEADS), None), stock(*tensors(HEADS), None))


def test_a_layer_without_a_window_sees_all():
    """``--window-attn-skip-freq 2``: every second layer."""
    first, second = (module((3, 0), number=number, window_attn_skip_freq=2) for number in (1, 2))
    everything = module()(*tensors(HEADS), None)
    assert not torch.equal(first(*tensors(HEADS), None), everything)
    assert torch.equal(second(*tensors(HEADS), None), everything)


def test_queries_after_kept_keys_see_their_window():
    """Inference that keeps keys gives a token what training gives it."""
    built = module((3, 0))
    query, key, value = tensors(HEADS)
    whole = built(query, key, value, None)
    assert torch.allclose(built(query[-2:], key, value, None), whole[-2:], atol=1e-6)
    assert torch.allclose(built(query[-1:], key, value, None), whole[-1:], atol=1e-6)


def test_values_may_have_another_size_than_keys():
    built = LocalAttention(
        module((3, 0)).config, 1, AttnMaskType.causal, "self", pg_collection=small.groups(), v_channels=4
    )
    query, key, value = tensors(HEADS)
    expected = dense(query.double(), key.double(), value[..., :4].double(), (3, 0), True, None)
    found = built(query, key, value[..., :4].contiguous(), document_mask())
    assert small.relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("window", [None, (-1, -1)])
def test_attention_that_is_not_causal_sees_all(window):
    assert fold_masks(None, torch.arange(4), 4, causal=False, window=window) is None
    sees = ~fold_masks(None, torch.arange(4), 4, causal=False, window=(1, 2))
    assert sees.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("changes", "attention"),
    [({}, DotProductAttention), ({"window_size": (3, 0)}, LocalAttention)],
    ids=["stock", "window"],
)
def test_a_window_brings_our_attention_into_models(changes, attention):
    model = small.build("pre", small.transformer_config(**changes))
    assert {type(layer.self_attention.core_attention) for layer in model.decoder.layers} == {attention}


def test_models_with_a_window_and_documents_are_trained_with_both():
    """A window as long as the sequence changes nothing, with documents either."""

    def losses(mask, **changes):
        model = small.build("peri", small.transformer_config(**changes))
        ids, labels = small.tokens()
        return model(ids, torch.arange(small.SEQUENCE).expand_as(ids), mask, labels=labels)

    position = torch.arange(small.SEQUENCE)
    mask = ((position > position[:, None]) | ((position[:, None] >= 5) & (position < 5)))[None, None]
    assert torch.equal(losses(mask, window_size=(small.SEQUENCE, 0)), losses(mask))
    apart = [losses(mask), losses(None), losses(mask, window_size=(2, 0)), losses(None, window_size=(2, 0))]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(apart, 2))
