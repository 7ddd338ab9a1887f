import pytest
import torch
import torch.nn.functional as F
from factories import features

from rapa_dist.machine import Machine, pooled


def paper_machine(*tiles, channels=(32, 32, 64)):
    return Machine.build(channels=channels, tiles=tiles)


@pytest.mark.parametrize(
    ("channels", "tiles", "n_weights"),
    [
        ((32, 32, 64), (1, 1, 1), 79_328),
        ((32, 32, 64), (16, 4, 1), 192_704),
        ((54, 64, 64), (1, 1, 1), 193_032),
        ((32, 32, 64), (128, 32, 8), 1_541_632),
    ],
)
def test_weights_are_counted_as_in_the_paper(channels, tiles, n_weights):
    assert paper_machine(*tiles, channels=channels).n_weights == n_weights


def test_planes_shrink_as_the_paper_says():
    machine = paper_machine(16, 4, 1)
    assert [layer.passages[0].out[0] for layer in machine.arrays] == [32, 16, 8]
    assert [layer.n_patches for layer in machine.arrays] == [1024, 256, 64]
    assert features(machine) == 4 * 4 * 64


@pytest.mark.parametrize("side", range(2, 41))
def test_pooled_side_is_that_of_torch_rounding_up(side):
    planes = torch.zeros(1, 1, side, side)
    assert pooled(side) == F.max_pool2d(planes, 3, 2, ceil_mode=True).shape[-1]
    assert pooled(side) == F.avg_pool2d(planes, 3, 2, ceil_mode=True).shape[-1]


def test_a_layer_has_one_kernel_row_per_input_of_a_patch_and_one_for_the_bias():
    first, second, third = paper_machine(16, 4, 1).arrays
    assert [first.k, second.k, third.k] == [5 * 5 * 3, 5 * 5 * 32, 5 * 5 * 32]
    assert [layer.kernel_shape for layer in (first, second, third)] == [(76, 32), (801, 32), (801, 64)]


def test_the_channels_of_a_layer_are_the_inputs_of_the_next():
    layers = paper_machine(1, 1, 1, channels=(54, 64, 64)).arrays
    assert [(layer.k, layer.c_out) for layer in layers] == [(25 * 3, 54), (25 * 54, 64), (25 * 64, 64)]


def test_every_tile_has_one_number():
    machine = paper_machine(3, 2, 1)
    assert machine.tiles == ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0))


def test_layers_without_a_number_of_tiles_are_refused():
    with pytest.raises(ValueError, match="zip"):
        Machine.build(channels=(32, 32, 64), tiles=(16, 4))
