"""The bubble of a pipeline, by running Megatron's order of microbatches."""

import pytest

from megatron_periln.plan.costs.schedule import Piece, Pipeline, bubble, order


@pytest.mark.parametrize(
    "stages, microbatches, chunks", [(2, 1, 1), (4, 8, 1), (8, 4, 1), (4, 8, 2), (8, 64, 4)]
)
def test_stages_alike_wait_as_long_as_the_formula_says(stages, microbatches, chunks):
    """(p - 1) / (v m + p - 1) of the step: Narayanan et al., 2021, section 2.2."""
    pipeline = Pipeline(stages, microbatches, chunks)
    assert bubble(pipeline) == pytest.approx(pipeline.ideal_bubble, rel=1e-9)


def test_without_a_pipeline_nothing_waits():
    assert bubble(Pipeline(1, 16)) == 0


def test_one_f_one_b():
    """Stage 0 of 2 runs ahead by one microbatch, the last by none."""
    ways = ["".join(piece.way[0] for piece in order(Pipeline(2, 3), stage)) for stage in range(2)]
    assert ways == ["ffbfbb", "fbfbfb"]


def test_interleaved_chunks_take_turns():
    """Megatron's order on the first of two stages: two microbatches in each chunk before the next."""
    found = order(Pipeline(2, 4, 2), 0)
    forward = [(piece.microbatch, piece.chunk) for piece in found if piece.way == "forward"]
    assert forward == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]
    assert next(piece for piece in found if piece.way == "backward") == Piece("backward", 0, 1)


def test_a_slow_stage_is_waited_for():
    pipeline = Pipeline(4, 32)
    slow = bubble(pipeline, [[1.0], [1.0], [1.0], [2.0]])
    assert slow > 0.35 > bubble(pipeline)


def test_microbatches_that_do_not_fill_their_groups_cost_more():
    """The formula does not know of it."""
    pipeline = Pipeline(4, 6, 2)
    assert bubble(pipeline) > 1.5 * pipeline.ideal_bubble


def test_another_order_is_found(monkeypatch):
    """The negative control: each microbatch through all chunks before the next waits longer."""
    pipeline = Pipeline(4, 8, 2)

    def in_a_row(pipeline, stage):
        each = [(m, c) for m in range(pipeline.microbatches) for c in range(pipeline.chunks)]
        forward = [Piece("forward", m, c) for m, c in each]
        return forward + [Piece("backward", m, pipeline.chunks - 1 - c) for m, c in each]

    monkeypatch.setattr("megatron_periln.plan.costs.schedule.order", in_a_row)
    assert bubble(pipeline) > 2 * pipeline.ideal_bubble
