"""Layers on tiles against per-patch kernels under autograd in double precision, for any geometry and scheme."""

import warnings
from math import isqrt

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from per_patch import convolve, tile_of_patches
from torch.testing import assert_close

from rapa_dist.demand import training_floats
from rapa_dist.errors import UsageError
from rapa_dist.fabric.batched import BatchedFabric
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.machine import Machine
from rapa_dist.nn.deploy import on_tiles
from rapa_dist.nn.layers import RapaConv2d, RapaLinear, geometry_of
from rapa_dist.nn.optim import RapaSGD
from rapa_dist.nn.record import record
from rapa_dist.schemes import SCHEMES, SQUARE_SCHEMES

RATE, DECAY, SEED = 0.05, 0.5, 3
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}  # sums of up to some hundred products of numbers around 1


def opened(model, images, fabric):
    recording = record(model, images)
    if fabric == "batched":
        tiles = BatchedFabric(recording.machine, [layer.kernels for layer in recording.layers])
    else:
        kernels = [layer.kernels.detach().numpy() for layer in recording.layers]
        floats = training_floats(recording.machine, len(images))
        tiles = SerialFabric(recording.machine, floats, kernels)
    return recording, tiles


@st.composite
def layers(draw):
    """Return arguments of `RapaConv2d` with random geometry, and planes that it takes."""
    pair = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))  # noqa: E731
    kernel, dilation = pair(1, 4), pair(1, 2)
    same = draw(st.booleans())
    stride, padding = ((1, 1), "same") if same else (pair(1, 3), pair(0, 3))
    c_in, c_out = pair(1, 3)
    needed = [1 if same else d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=False)]
    if same:
        needed = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = tuple(max(1, least) + draw(st.integers(0, 5)) for least in needed)
    scheme = draw(st.sampled_from(SCHEMES))
    arguments = {
        "in_channels": c_in,
        "out_channels": c_out,
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "bias": draw(st.booleans()),
    }
    out = geometry_of(RapaConv2d(**arguments), torch.zeros(1, c_in, *size), "conv").out
    most = min(out) ** 2 if scheme in SQUARE_SCHEMES else out[0] * out[1]
    tiles = 1 if scheme == "none" else draw(st.integers(1, min(most, 9)))
    if scheme in SQUARE_SCHEMES:
        tiles = isqrt(tiles) ** 2
    return arguments | {"tiles": tiles, "scheme": scheme}, (draw(st.integers(1, 3)), c_in, *size)


@pytest.mark.parametrize("fabric", ["serial", "batched"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=layers())
def test_a_convolution_of_any_geometry_computes_passes_errors_back_and_learns(fabric, case):
    arguments, shape = case
    torch.manual_seed(0)
    layer = RapaConv2d(**arguments)
    with torch.no_grad():
        layer.kernels.uniform_(-1, 1)  # biases, too
    model = torch.nn.Sequential(layer)
    planes = torch.randn(shape, requires_grad=True)
    before = layer.kernels.detach().double().requires_grad_()
    exact = planes.detach().double().requires_grad_()
    recording, tiles = opened(model, planes, fabric)
    (array,) = recording.machine.arrays
    tile, mask = tile_of_patches(layer, array, array.passages[0], shape[0], seed=SEED, place=(0,))
    names = ("stride", "dilation", "padding", "bias")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = convolve(
            exact, before, tile, mask, kernel=arguments["kernel_size"], **{name: arguments[name] for name in names}
        )
    with tiles, on_tiles(recording, tiles, seed=SEED):
        optimizer = RapaSGD(model, lr=RATE, weight_decay=DECAY)
        outputs = model(planes)
        errors = torch.randn(outputs.shape)
        outputs.backward(errors)
        optimizer.step()
    expected.backward(errors.double())
    assert_close(outputs.double(), expected, **FLOAT32)
    assert_close(planes.grad.double(), exact.grad, **FLOAT32)
    assert_close(layer.kernels.detach().double(), before.detach() * (1 - RATE * DECAY) - RATE * before.grad, **FLOAT32)


def test_equal_kernels_are_conv2d():
    layer = RapaConv2d(3, 5, 3, padding=1, tiles=4)
    with torch.no_grad():
        layer.kernels[:] = layer.kernels[:1].clone()
    planes = torch.randn(2, 3, 6, 7)
    weight = layer.kernels[0, :27].view(3, 3, 3, 5).permute(3, 2, 0, 1)
    assert_close(layer(planes), F.conv2d(planes, weight, layer.kernels[0, 27], padding=1), **FLOAT32)


def test_a_linear_layer_has_a_patch_for_every_vector():
    layer = RapaLinear(6, 4, tiles=3)
    with torch.no_grad():
        layer.kernels[:] = layer.kernels[:1].clone()
    vectors = torch.randn(2, 5, 6)
    expected = F.linear(vectors, layer.kernels[0, :6].t(), layer.kernels[0, 6])
    assert_close(layer(vectors), expected, **FLOAT32)
    assert_close(layer(vectors[0, 0]), expected[0, 0], **FLOAT32)
    assert record(torch.nn.Sequential(layer), vectors).machine.arrays[0].n_patches == 5


def test_a_single_image_is_a_batch_of_one():
    layers = RapaConv2d(2, 3, 3, padding=1, tiles=4), RapaLinear(6, 2, tiles=2)
    for layer, one in zip(layers, (torch.randn(2, 5, 7), torch.randn(6)), strict=True):
        seen = []
        layer.register_forward_hook(lambda layer, arguments, output, seen=seen: seen.append(output.shape))
        output = layer(one)
        assert len(seen) == 1, "who watches sees one call"
        assert output.shape == layer(one.unsqueeze(0)).shape[1:]


def test_without_gradients_a_test_is_drawn_and_nothing_is_learnt():
    model = torch.nn.Sequential(RapaConv2d(1, 2, 3, tiles=4))
    planes = torch.randn(1, 1, 6, 6)
    recording, tiles = opened(model, planes, "serial")
    with tiles, on_tiles(recording, tiles, seed=0) as session:
        before = tiles.all_kernels()
        with torch.no_grad():
            first, second = model(planes), model(planes)
        assert not torch.equal(first, second)  # each test has assignments of its own
        assert session.step == 0
        assert (tiles.all_kernels()[0] == before[0]).all()
        assert tiles._lending.lent == 0


def test_a_place_is_returned_when_outputs_are_dropped():
    model = torch.nn.Sequential(RapaConv2d(1, 2, 3, tiles=4))
    planes = torch.randn(1, 1, 6, 6)
    recording, tiles = opened(model, planes, "serial")
    with tiles, on_tiles(recording, tiles, seed=0):
        for _ in range(100):
            model(planes)
        assert tiles._lending.lent == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"groups": 2}, "groups=2 has several"),
        ({"padding_mode": "reflect"}, "not by padding_mode='reflect'"),
        ({"kernel_size": 0}, "kernel_size needs one or two numbers of at least 1; it is 0"),
        ({"stride": (1, 2, 3)}, "stride needs one or two numbers"),
        ({"tiles": 0}, "needs at least 1 tile; it has 0"),
        (
            {"tiles": 12, "scheme": "image-overlap"},
            "image-overlap needs a square number of tiles; here are 12. Use 9 or 16",
        ),
        ({"tiles": 4, "scheme": "none"}, "scheme none means one tile per layer; here are 4"),
        ({"scheme": "randon"}, "Did you mean random"),
    ],
)
def test_bad_input_to_a_layer(arguments, words):
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        RapaConv2d(**({"in_channels": 2, "out_channels": 4, "kernel_size": 3} | arguments))


def test_bad_input_of_images():
    layer = RapaConv2d(2, 4, 3)
    with pytest.raises(UsageError, match=r"takes images \(images, 2, h, w\); it got \(1, 3, 8, 8\)"):
        layer(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UsageError, match="reaches over 3 × 3 pixels needs at least as many; here are 2 × 8"):
        layer(torch.zeros(1, 2, 2, 8))


def test_the_machine_is_what_images_met():
    model = torch.nn.Sequential(RapaConv2d(1, 2, 3, tiles=4), torch.nn.ReLU(), RapaConv2d(2, 3, 1, bias=False))
    recording = record(model, (10, 1, 6, 5))
    first, second = recording.machine.arrays
    assert (first.name, first.n_patches, first.input_error, first.kernel_shape) == ("0", 12, False, (10, 2))
    assert (second.name, second.n_patches, second.input_error, second.kernel_shape) == ("2", 12, True, (2, 3))
    assert recording.first == 0
    assert isinstance(recording.machine, Machine)
