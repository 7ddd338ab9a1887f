"""What lies between the convolutions: poolings, ReLU and normalisation, against loops over windows and autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rapa_dist.config import POOLING_NAMES
from rapa_dist.native import native, use_threads
from rapa_dist.native import stage as native_stage
from rapa_dist.nn.minibatch import MiniBatch, Part, at_work
from rapa_dist.nn.normalisation import normalise, normalise_backward
from rapa_dist.nn.pooling import POOLINGS, MaxPooling
from rapa_dist.nn.stage import Stage
from rapa_dist.streams import Purpose, stream

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
BETA = torch.tensor([0.2, -0.1, 0.05])
any_size = pytest.mark.parametrize("size", [(32, 32), (16, 9), (8, 8), (7, 5), (5, 2), (3, 4)], ids=str)
any_method = pytest.mark.parametrize("method", POOLING_NAMES)


def planes_of(size, images=2, channels=3, scale=1.0, seed=0):
    values = np.random.default_rng(seed).normal(scale=scale, size=(images, *size, channels))
    return torch.from_numpy(values.astype(np.float32))


def like(planes, seed=1):
    return planes_of(planes.shape[1:3], len(planes), planes.shape[3], seed=seed)


# --- pooling


def pool(method, planes, draws=None):
    """Return the smaller planes, and a function from their errors to those of the planes and to the gradient of β."""
    pooling = POOLINGS[method]()
    smaller, saved = pooling.forward(planes, BETA[: planes.shape[3]] if method == "mixed" else None, draws)
    return smaller, lambda errors: pooling.backward(saved, errors)


def largest(window, beta, draw):
    return window.amax(dim=(1, 2))


def mean(window, beta, draw):
    return window.mean(dim=(1, 2))


def mixture(window, beta, draw):
    alpha = 1 / (1 + torch.exp(10 * beta))
    return alpha * mean(window, beta, draw) + (1 - alpha) * largest(window, beta, draw)


def drawn_or_expected(window, beta, draw):
    """Zeiler & Fergus: with probability a / Σ a the activation a; without a draw the expectation."""
    activations = window.flatten(1, 2)  # (images, pixels, channels)
    total = activations.sum(dim=1)
    if draw is None:
        return (activations**2).sum(dim=1) / total.clamp_min(1e-30)
    result = []
    for image, channel in np.ndindex(*draw.shape):
        reached = torch.cumsum(activations[image, :, channel], dim=0) > draw[image, channel] * total[image, channel]
        first = int(reached.nonzero()[0]) if reached.any() else 0  # if none is above 0, any will do
        result.append(activations[image, first, channel])
    return torch.stack(result).reshape(draw.shape)


OF_WINDOW = {"max": largest, "average": mean, "stochastic": drawn_or_expected, "mixed": mixture}


def plain_pool(method, planes, beta=None, draws=None):
    """Pooling over Caffe's 3×3 windows with stride 2, each cut off at the edge; autograd goes back through it."""
    h, w = (-(-(side - 3) // 2) + 1 for side in planes.shape[1:3])

    def pooled(y, x):
        window = planes[:, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3]
        return OF_WINDOW[method](window, beta, None if draws is None else draws[:, y, x])

    return torch.stack([torch.stack([pooled(y, x) for x in range(w)], dim=1) for y in range(h)], dim=1)


@any_size
@any_method
def test_pooling_is_over_what_is_inside_of_every_window(method, size):
    planes = planes_of(size)
    planes = planes.relu() if method == "stochastic" else planes
    plain, beta = planes.double().requires_grad_(), BETA.double().requires_grad_()
    expected = plain_pool(method, plain, beta)
    smaller, back = pool(method, planes)
    assert_close(smaller.double(), expected.detach(), **FLOAT32)
    errors = like(smaller)
    expected.backward(errors.double())
    of_planes, of_beta = back(errors)
    assert_close(of_planes.double(), plain.grad, **FLOAT32)
    if method == "mixed":
        assert_close(of_beta.double(), beta.grad, rtol=1e-4, atol=1e-5)
    else:
        assert of_beta is None


@any_size
def test_stochastic_pooling_gives_the_activation_that_was_drawn_and_the_error_to_it(size):
    planes = planes_of(size)
    plain, planes = planes.double().requires_grad_(), planes.relu()
    draws = torch.from_numpy(np.random.default_rng(3).random(pool("stochastic", planes)[0].shape, np.float32))
    expected = plain_pool("stochastic", plain.relu(), draws=draws.double())
    smaller, back = pool("stochastic", planes, draws)
    assert_close(smaller.double(), expected.detach(), **FLOAT32)
    errors = like(smaller)
    expected.backward(errors.double())
    assert_close(back(errors)[0].double() * (planes > 0), plain.grad, **FLOAT32)


def test_stochastic_pooling_draws_in_proportion_to_the_activations():
    window = torch.tensor([[1.0, 2.0, 0.0], [0.0, 4.0, 0.0], [0.5, 2.5, 0.0]])
    n_draws = 100_000
    planes = window.view(1, 3, 3, 1).expand(n_draws, 3, 3, 1)
    draws = torch.from_numpy(np.random.default_rng(0).random((n_draws, 1, 1, 1), np.float32))
    drawn, _ = pool("stochastic", planes, draws)
    for activation, probability in ((1, 0.1), (2, 0.2), (4, 0.4), (0.5, 0.05), (2.5, 0.25)):
        share = (drawn == activation).double().mean().item()
        assert abs(share - probability) < 5 * np.sqrt(probability * (1 - probability) / n_draws)
    expected, _ = pool("stochastic", planes[:1])
    assert expected.item() == pytest.approx((1 + 4 + 16 + 0.25 + 6.25) / 10)
    assert abs(drawn.mean().item() - expected.item()) < 0.02


@pytest.mark.parametrize("draws", [None, torch.full((1, 4, 4, 1), 0.999)])
def test_stochastic_pooling_of_windows_without_activation_gives_zeros_and_no_error(draws):
    smaller, back = pool("stochastic", torch.zeros(1, 8, 8, 1), draws)
    assert not smaller.any()
    assert not back(torch.ones(1, 4, 4, 1))[0].any()


@any_method
def test_pooling_changes_neither_its_input_nor_the_errors(method):
    planes, errors = planes_of((8, 8)), planes_of((4, 4), seed=1)
    kept, kept_errors = planes.clone(), errors.clone()
    pool(method, planes)[1](errors)
    assert torch.equal(planes, kept)
    assert torch.equal(errors, kept_errors)


def test_every_pooling_that_can_be_asked_for_exists():
    assert tuple(POOLINGS) == POOLING_NAMES


# --- normalisation


def plain_normalise(planes):
    """x · (1 + α · avgpool3×3(x²))^−β with nine loops and zeros beyond the edge; any precision."""
    h, w = planes.shape[1:3]
    padded = F.pad(planes * planes, (0, 0, 1, 1, 1, 1))
    total = sum(padded[:, y : y + h, x : x + w] for y in range(3) for x in range(3))
    return planes * (1 + 5e-5 * total / 9) ** -0.75


sizes_of_normalisation = pytest.mark.parametrize("size", [(16, 16), (8, 5), (4, 4)], ids=str)


@sizes_of_normalisation
def test_normalisation_is_the_formula(size):
    planes = planes_of(size, scale=200)  # large, so that α x² is about 2
    expected = plain_normalise(planes.double())
    assert (expected / planes).median() < 0.7
    assert_close(normalise(planes)[0].double(), expected, rtol=1e-5, atol=1e-4)


@sizes_of_normalisation
def test_the_gradient_of_normalisation_is_autograds(size):
    planes, errors = planes_of(size, scale=200), planes_of(size, seed=1)
    _, saved = normalise(planes)
    plain = planes.double().requires_grad_()
    plain_normalise(plain).backward(errors.double())
    assert_close(normalise_backward(saved, errors).double(), plain.grad, rtol=1e-5, atol=1e-5)


# --- all of it


def a_stage(method, layer=0):
    stage = Stage(method, layer, 3)
    if method == "mixed":
        with torch.no_grad():
            stage.beta.copy_(BETA)
    return stage


def plain_stage(method, layer, planes, beta, draws=None):
    """Caffe pools its first layer before ReLU, the others behind it; stochastic pooling always needs activations."""
    if layer == 0 and method != "stochastic":
        return plain_normalise(plain_pool(method, planes, beta).relu())
    return plain_normalise(plain_pool(method, planes.relu(), beta, draws))


@pytest.mark.parametrize("size", [(8, 8), (7, 4)], ids=str)
@pytest.mark.parametrize("layer", [0, 1])
@any_method
def test_a_stage_is_relu_pooling_and_normalisation_and_autograd_goes_back_through_it(method, layer, size):
    outputs, stage = planes_of(size, scale=200).permute(0, 3, 1, 2).requires_grad_(), a_stage(method, layer).eval()
    plain, beta = outputs.detach().double().permute(0, 2, 3, 1).requires_grad_(), BETA.double().requires_grad_()
    expected = plain_stage(method, layer, plain, beta)
    errors = like(expected)
    expected.backward(errors.double())
    kept, kept_errors = outputs.detach().clone(), errors.clone()
    smaller = stage(outputs)
    smaller.backward(errors.permute(0, 3, 1, 2))
    assert_close(smaller.double().permute(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-4)
    assert_close(outputs.grad.double().permute(0, 2, 3, 1), plain.grad, rtol=1e-5, atol=1e-5)
    if method == "mixed":
        assert_close(stage.beta.grad.double(), beta.grad, rtol=1e-4, atol=1e-3)
    assert torch.equal(outputs, kept)
    assert torch.equal(errors, kept_errors)


@pytest.mark.skipif(native().library is None, reason=str(native()))
@pytest.mark.parametrize("channels", [1, 8, 20, 32, 45])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("method", ["max", "average"])
@pytest.mark.parametrize("kind", ["any", "ties", "NaN"])
def test_the_library_makes_of_any_planes_what_torch_does(method, layer, channels, kind, monkeypatch):
    planes = planes_of((9, 8), channels=channels, scale=3)
    if kind == "ties":
        planes = planes.round()
    if kind == "NaN":
        planes[0, 3, 3], planes[1, 8, 7] = torch.nan, torch.nan
    found = []
    for in_c in (True, False):
        if not in_c:
            monkeypatch.setattr(native_stage, "does", lambda planes, method: False)
        outputs = planes.permute(0, 3, 1, 2).clone(memory_format=torch.channels_last).requires_grad_()
        smaller = Stage(method, layer, channels)(outputs)
        smaller.backward(like(smaller.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        found.append((smaller.detach(), outputs.grad))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.skipif(native().library is None, reason=str(native()))
@pytest.mark.parametrize("size", [(32, 32), (7, 6)], ids=str)
def test_the_library_rounds_as_it_is_written(size):
    """Bit by bit what NumPy makes of the same sums, roots and products: no processor's approximation is in them."""
    planes = planes_of(size, channels=13, scale=300)
    outputs = planes.permute(0, 3, 1, 2).clone(memory_format=torch.channels_last).requires_grad_()
    smaller = a_stage("max")(outputs)
    errors = like(smaller.permute(0, 2, 3, 1))
    smaller.backward(errors.permute(0, 3, 1, 2))

    def mean(values):
        padded = np.pad(values, ((0, 0), (1, 1), (1, 1), (0, 0)))
        rows = padded[:, :, :-2] + padded[:, :, 1:-1] + padded[:, :, 2:]
        return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) * np.float32(1 / 9)

    one, alpha = np.float32(1), 5e-5
    x, of_max = MaxPooling().forward(planes)
    x = x.relu().numpy()
    inverse = one / np.sqrt(one + np.float32(alpha) * mean(x * x))
    factor = np.sqrt(inverse) * inverse
    assert np.array_equal(smaller.detach().permute(0, 2, 3, 1), x * factor)
    direct = errors.numpy() * factor
    back = direct - np.float32(2 * alpha * 0.75) * (mean(direct * (x * inverse * inverse)) * x)
    expected, _ = MaxPooling().backward(of_max, torch.from_numpy(np.where(x > 0, back, 0)))
    assert torch.equal(outputs.grad.permute(0, 2, 3, 1), expected)


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


def test_who_watches_the_operations_sees_the_pooling():
    """As `rapa-dist analyze` does to count wins."""
    planes, stage = planes_of((8, 8)).permute(0, 3, 1, 2), a_stage("max")
    with torch.no_grad(), Watching() as watching:
        watched = stage(planes)
    assert torch.ops.aten.max_pool2d_with_indices.default in watching.seen
    assert_close(watched, stage(planes))


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_bits_of_a_stage_do_not_depend_on_the_number_of_threads(threads):
    found = []
    try:
        for count in (1, threads):
            use_threads(count)
            outputs = planes_of((16, 16), images=10).permute(0, 3, 1, 2).requires_grad_()
            smaller = a_stage("max")(outputs)
            smaller.backward(smaller.detach())
            found.append((smaller.detach(), outputs.grad))
    finally:
        use_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def drawn(layer=0, seed=0, step=5, sizes=(4,), part=0):
    """What stochastic pooling makes of the same planes in a part of a training step."""
    planes = planes_of((8, 7), images=4).permute(0, 3, 1, 2)
    first = sum(sizes[:part])
    with at_work(Part(MiniBatch(True, (step,), sizes, seed), part)):
        return a_stage("stochastic", layer).train()(planes[first : first + sizes[part]])


def test_draws_of_stochastic_pooling_are_a_function_of_seed_layer_and_step():
    assert torch.equal(drawn(), drawn())
    assert not any(torch.equal(drawn(), other) for other in (drawn(layer=1), drawn(seed=1), drawn(step=6)))
    draws = stream(0, Purpose.POOL_TRAIN, 1, 5).random((4, 4, 3, 3), "float32")
    expected = plain_stage("stochastic", 1, planes_of((8, 7), images=4), None, torch.from_numpy(draws))
    assert_close(drawn(layer=1).permute(0, 2, 3, 1), expected)


def test_an_image_has_the_same_draws_however_the_mini_batch_is_cut():
    assert torch.equal(torch.cat([drawn(sizes=(3, 1), part=part) for part in (0, 1)]), drawn())


def test_outside_of_a_schedule_stochastic_pooling_draws_anew_every_time_and_in_a_test_never():
    planes, stage = planes_of((8, 8)).permute(0, 3, 1, 2), a_stage("stochastic")
    assert not torch.equal(stage(planes), stage(planes))
    stage.eval()
    assert torch.equal(stage(planes), stage(planes))


def test_mixed_pooling_starts_with_a_share_of_88_percent_for_the_maximum():
    planes = planes_of((8, 8)).permute(0, 3, 1, 2)
    mixed, maximum, average = (Stage(method, 0, 3)(planes) for method in ("mixed", "max", "average"))
    positive = average > 0  # elsewhere ReLU is in between
    expected = 0.8808 * maximum + 0.1192 * average
    assert_close(mixed[positive], expected[positive], rtol=1e-3, atol=1e-4)
