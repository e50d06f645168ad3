import numpy as np

from megatron_periln.monitor.tensorboard import heat_map


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
