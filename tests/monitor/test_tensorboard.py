import io
import math

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.tensorboard import SummaryWriter

from megatron_periln.monitor import tensorboard
from megatron_periln.monitor.statistics import STATISTICS
from megatron_periln.monitor.tensorboard import Board, heat_map


def cells(history):
    return heat_map(history)[::8, ::8]


def test_maps_show_depth_upwards_and_training_to_the_right():
    image = cells([[1.0, 10.0], [1.0, 100.0], [1.0, 100.0]])
    assert image.shape == (2, 3, 3)
    dark, half, bright = image[1, 0], image[0, 0], image[0, 2]
    assert dark.tolist() == [20, 24, 82] and bright.tolist() == [252, 232, 96]
    assert half.tolist() == [196, 60, 96]
    assert (image[1] == dark).all()


def test_values_without_a_logarithm_are_grey():
    image = cells([[None, 1.0, 0.0, float("nan"), 2.0, float("inf")]])
    assert (image[[0, 2, 3, 5], 0] == 160).all()
    assert not (image[[1, 4], 0] == 160).any()
    assert (cells([[None, None]]) == 160).all()


def test_a_constant_is_one_color():
    assert len(np.unique(cells([[3.0, 3.0]]).reshape(-1, 3), axis=0)) == 1


@pytest.fixture
def writer(tmp_path, monkeypatch):
    """Stands in for Megatron's; a board writes to it."""
    with SummaryWriter(tmp_path) as writer:
        monkeypatch.setattr(tensorboard, "get_tensorboard_writer", lambda: writer)
        yield writer


def statistics(interval, layers):
    """Numbers that differ; the last statistic misses its first layer in every third interval."""
    values = {
        name: [1.0 + 1000 * interval + 10 * layer + number for layer in layers]
        for number, name in enumerate(STATISTICS)
    }
    if interval % 3 == 0:
        values[list(STATISTICS)[-1]][0] = None
    return values


def test_an_interval_is_one_event_with_a_scalar_of_each_statistic_and_layer(writer, tmp_path):
    board, layers = Board(), [0, 1, 7]
    recorded = [statistics(interval, layers) for interval in range(1, 8)]
    recorded[4]["stream_variance"][1] = math.nan
    for interval, values in enumerate(recorded, 1):
        board.layers(10 * interval, layers, values)
    writer.flush()
    (file,) = tmp_path.iterdir()
    events = [event for event in EventFileLoader(str(file)).Load() if event.HasField("summary")]
    assert [event.step for event in events] == [10, 20, 30, 40, 50, 60, 70]  # each read by its checksum
    board = EventAccumulator(str(tmp_path)).Reload()
    for name in STATISTICS:
        for place, layer in enumerate(layers):
            expected = {10 * i: values[name][place] for i, values in enumerate(recorded, 1)}
            found = {event.step: event.value for event in board.Scalars(f"monitor-{name}/layer-{layer:03d}")}
            present = {step: value for step, value in expected.items() if value is not None}
            assert found == pytest.approx(present, rel=1e-6, nan_ok=True)


def test_maps_are_written_as_the_run_grows_and_at_its_end(writer, tmp_path):
    board, layers = Board(), [0, 1]
    for interval in range(1, 41):
        board.layers(interval, layers, statistics(interval, layers), last=interval == 40)
    writer.flush()
    loaded = EventAccumulator(str(tmp_path), {"images": 0, "scalars": 0}).Reload()
    images = loaded.Images("monitor/stream_variance")
    steps = [image.step for image in images]
    assert steps[:9] == [1, 2, 3, 4, 5, 6, 7, 8, 9] and steps[-1] == 40 and len(steps) < 30
    picture = Image.open(io.BytesIO(images[-1].encoded_image_string))
    assert picture.size == (images[-1].width, images[-1].height) == (8 * 40, 8 * 2)
    history = [statistics(interval, layers)["stream_variance"] for interval in range(1, 41)]
    assert (np.array(picture.convert("RGB")) == heat_map(history)).all()
    assert len(loaded.Scalars("monitor-stream_variance/layer-001")) == 40


def test_maps_keep_their_number_of_columns(writer, tmp_path):
    board = Board()
    for interval in range(1, 201):
        board.layers(interval, [0, 1], statistics(interval, [0, 1]), last=interval == 200)
    writer.flush()
    image = EventAccumulator(str(tmp_path)).Reload().Images("monitor/stream_variance")[-1]
    assert image.step == 200 and image.width <= 8 * 96
