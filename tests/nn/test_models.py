"""Whole models on tiles: three steps against plain PyTorch with one tile, against explicit per-patch sums with more."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, ResidualBlock, UsedTwice, images_for
from per_patch import Explicit
from test_layers import opened
from torch.testing import assert_close

from rapa_dist.errors import UsageError
from rapa_dist.nn.convert import convert, revert
from rapa_dist.nn.deploy import on_tiles
from rapa_dist.nn.layers import RapaConv2d, RapaLinear
from rapa_dist.nn.optim import RapaSGD
from rapa_dist.nn.record import record
from rapa_dist.nn.schedule import Learner, MicroBatches, Step, Whole

RATE, DECAY = 0.1, 0.01
LABELS = torch.tensor([0, 3, 1, 4])
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


def train(model, images, steps=3, *, end_step=lambda: None, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=RATE, weight_decay=DECAY)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(*images), LABELS).backward()
        optimizer.step()
        end_step()
    return model


def train_on_tiles(model, images, fabric, steps=3):
    recording, tiles = opened_with(model, images, fabric)
    with tiles, on_tiles(recording, tiles, seed=7):
        train(model, images, steps, optimizer=RapaSGD(model, lr=RATE, weight_decay=DECAY))
    return recording


def opened_with(model, images, fabric):
    if len(images) == 1:
        return opened(model, images[0], fabric)
    return opened(model, images, fabric)


@pytest.mark.parametrize("fabric", ["serial", "batched"])
@pytest.mark.parametrize("kind", MODELS)
def test_with_one_tile_a_model_learns_as_in_plain_pytorch(kind, fabric):
    torch.manual_seed(0)
    plain = kind()
    images = images_for(plain)
    model = copy.deepcopy(plain)
    convert(model, tiles=1, images=images)
    train_on_tiles(model, images, fabric)
    train(plain, images)
    revert(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert_close(tensor, plain.state_dict()[name], **FLOAT32)


@pytest.mark.parametrize("fabric", ["serial", "batched"])
@pytest.mark.parametrize("scheme", ["random", "random-fixed", "alternate"])
@pytest.mark.parametrize("kind", MODELS)
def test_with_several_tiles_a_model_learns_as_per_patch_sums_say(kind, scheme, fabric):
    torch.manual_seed(0)
    model = kind()
    images = images_for(model)
    convert(model, tiles=4, scheme=scheme, images=images, init="xavier")
    explicit = copy.deepcopy(model).double()
    recording = record(model, images)
    exact = []
    for array, layer in zip(recording.machine.arrays, recording.layers, strict=True):
        exact.append(Explicit(layer, array, seed=7))
        setattr(explicit, array.name, exact[-1])
    train_on_tiles(model, images, fabric)
    train(explicit, [image.double() for image in images], end_step=lambda: [layer.end_step() for layer in exact])
    for name, tensor in explicit.state_dict().items():
        assert_close(model.state_dict()[name].double(), tensor.double(), **FLOAT32)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_schedule_learns_as_a_loop_of_ones_own(parts):
    torch.manual_seed(0)
    model = UsedTwice()
    images = images_for(model)
    convert(model, tiles=4, images=images, init="xavier")
    other = copy.deepcopy(model)
    train_on_tiles(other, images, "serial")
    recording, tiles = opened_with(model, images, "serial")
    with tiles, on_tiles(recording, tiles, seed=7) as session:
        optimizer = RapaSGD(model, lr=RATE, weight_decay=DECAY)
        schedule = MicroBatches(parts) if parts > 1 else Whole()
        learner = Learner(model=model, optimizer=optimizer, session=session, recording=recording, schedule=schedule)
        results = list(learner.train(Step(number, images[0], LABELS, RATE) for number in range(3)))
        assert session.step == 3
        assert tiles._lending.lent == 0
    assert [result.images for result in results] == [4, 4, 4]
    for name, tensor in other.state_dict().items():
        assert_close(model.state_dict()[name], tensor, **FLOAT32)


def test_gradients_accumulate_until_a_step():
    torch.manual_seed(0)
    model = ResidualBlock().eval()  # batch normalisation would see other statistics in halves
    images = images_for(model)
    convert(model, tiles=[1, 1, 1])
    other = copy.deepcopy(model)
    train_on_tiles(other, images, "serial", steps=1)
    recording, tiles = opened_with(model, images, "serial")
    with tiles, on_tiles(recording, tiles, seed=7):
        optimizer = RapaSGD(model, lr=RATE, weight_decay=DECAY)
        for half in (slice(0, 2), slice(2, 4)):
            (F.cross_entropy(model(images[0][half]), LABELS[half]) / 2).backward()
        optimizer.step()
    for name, tensor in other.state_dict().items():
        assert_close(model.state_dict()[name], tensor, **FLOAT32)


def test_zero_grad_forgets_what_tiles_have_prepared():
    model = ResidualBlock()
    images = images_for(model)
    convert(model, tiles=[4, 4, 1])
    recording, tiles = opened_with(model, images, "serial")
    with tiles, on_tiles(recording, tiles, seed=7):
        before = tiles.all_kernels()
        optimizer = RapaSGD(model, lr=RATE)
        F.cross_entropy(model(*images), LABELS).backward()
        optimizer.zero_grad()
        with pytest.raises(UsageError, match="call backward"):
            optimizer.step()
        for kernels, was in zip(tiles.all_kernels(), before, strict=True):
            assert (kernels == was).all()


def test_every_layer_can_have_a_rate_of_its_own_and_schedulers_change_them():
    model = ResidualBlock()
    images = images_for(model)
    convert(model, tiles=[1, 1, 1])
    recording, tiles = opened_with(model, images, "serial")
    with tiles, on_tiles(recording, tiles, seed=7):
        before = tiles.all_kernels()
        optimizer = RapaSGD(model, lr=RATE, lr_of={"conv1": 1e-30})
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        F.cross_entropy(model(*images), LABELS).backward()
        optimizer.step()
        scheduler.step()
        after = tiles.all_kernels()
        changed = {
            array.name: bool((a != b).any())
            for array, a, b in zip(recording.machine.arrays, before, after, strict=True)
        }
        assert changed == {"conv0": True, "conv1": False, "around": True}
        assert [group["lr"] for group in optimizer.param_groups] == [RATE / 2, 5e-31, RATE / 2, RATE / 2]


def test_a_state_dict_has_the_kernels_of_all_tiles_and_goes_back():
    model = ResidualBlock()
    images = images_for(model)
    convert(model, tiles=[4, 4, 1])
    recording, tiles = opened_with(model, images, "serial")
    with tiles, on_tiles(recording, tiles, seed=7):
        saved = copy.deepcopy(model.state_dict())
        train(model, images, 1, optimizer=RapaSGD(model, lr=RATE))
        state = model.state_dict()
        assert state["conv1.kernels"].shape == (4, 37, 4)
        assert (state["conv1.kernels"] == torch.from_numpy(tiles.kernels(recording.machine.arrays[1]))).all()
        assert not torch.equal(state["conv1.kernels"], saved["conv1.kernels"])
        model.load_state_dict(saved)
        assert (torch.from_numpy(tiles.kernels(recording.machine.arrays[1])) == saved["conv1.kernels"]).all()
    other = ResidualBlock()
    convert(other, tiles=[4, 1, 1])
    with pytest.raises(RuntimeError, match=r"size mismatch for conv1.kernels.*\[4, 37, 4\].*\[1, 37, 4\]"):
        other.load_state_dict(saved)


def test_a_training_goes_on_bit_by_bit_from_the_two_state_dicts():
    def begun(rate):
        torch.manual_seed(0)
        model = ResidualBlock()
        convert(model, tiles=[4, 4, 1])
        recording, tiles = opened_with(model, images, "serial")
        return model, recording, tiles, lambda: RapaSGD(model, lr=rate, weight_decay=DECAY, lr_of={"conv1": rate / 2})

    images = images_for(ResidualBlock())
    model, recording, tiles, optimizer = begun(RATE)
    with tiles, on_tiles(recording, tiles, seed=7):
        stochastic = optimizer()
        schedule = torch.optim.lr_scheduler.StepLR(stochastic, step_size=1, gamma=0.5)
        train(model, images, 2, optimizer=stochastic, end_step=schedule.step)
        half_way = [copy.deepcopy(part.state_dict()) for part in (model, stochastic, schedule)]
        assert half_way[1]["step"] == 2
        train(model, images, 2, optimizer=stochastic, end_step=schedule.step)
        expected = copy.deepcopy(model.state_dict())
    for order in (slice(None), slice(None, None, -1)):  # whichever is loaded first
        model, recording, tiles, optimizer = begun(1.0)
        with tiles, on_tiles(recording, tiles, seed=7):
            stochastic = optimizer()
            schedule = torch.optim.lr_scheduler.StepLR(stochastic, step_size=1, gamma=0.5)
            for part, state in list(zip((model, stochastic, schedule), half_way, strict=True))[order]:
                part.load_state_dict(copy.deepcopy(state))
            assert {stats.last_step for stats in tiles.stats()} == {2}
            train(model, images, 2, optimizer=stochastic, end_step=schedule.step)
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, expected[name]), name


def test_bad_input_of_an_optimizers_state():
    model, other = ResidualBlock(), torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1))
    convert(model, tiles=[4, 4, 1])
    convert(other, tiles=[1])
    optimizer = RapaSGD(model, lr=RATE)
    with pytest.raises(UsageError, match=r"it has 0 \(1 parameter\); this one has conv0 .*Build the model"):
        optimizer.load_state_dict(RapaSGD(other, lr=RATE).state_dict())
    with pytest.raises(UsageError, match=r"state_dict\(\) of a RapaSGD"):
        optimizer.load_state_dict(torch.optim.SGD(other.parameters(), lr=RATE).state_dict())


def test_a_conversion_prints_as_a_table():
    model = nn_with_odd_layers()
    text = str(convert(model, tiles=16, images=(2, 2, 8, 8)))
    assert " ".join(text.splitlines()[0].split()) == "layer kernel matrix patches tiles rows per tile left digital"
    assert text.splitlines()[1].split() == ["0", "19×4", "64", "16", "4.0"]
    assert "groups = 2: a tile holds one kernel matrix for all channels" in text
    assert "padding_mode = reflect: tiles see zeros beyond the border" in text
    assert "only convolutions by default" in text


def nn_with_odd_layers():
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )


def test_linear_layers_go_on_tiles_where_asked_and_come_back():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    plain = copy.deepcopy(model)
    vectors = torch.randn(5, 4)
    convert(model, tiles=[1], where=lambda name, module: name == "1")
    assert isinstance(model[1], RapaLinear)
    assert_close(model(vectors), plain(vectors))
    revert(model)
    assert_close(model(vectors), plain(vectors))


def test_reverting_takes_the_strongest_filter_of_every_channel():
    model = torch.nn.Sequential(RapaConv2d(1, 2, 1, tiles=2))
    with torch.no_grad():
        model[0].kernels[:] = torch.tensor([[[3.0, 1.0], [0.1, 0.2]], [[-1.0, -2.0], [0.3, 0.4]]])
    revert(model)
    assert model[0].weight.flatten().tolist() == [3.0, -2.0]
    assert model[0].bias.tolist() == pytest.approx([0.1, 0.4])


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        (torch.nn.Sequential(torch.nn.ReLU()), {"tiles": 1}, "no convolution that can be put on tiles"),
        (torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1, groups=2)), {"tiles": [1]}, "0: groups = 2"),
        (
            ResidualBlock(),
            {"tiles": [4, 4]},
            "one number for each of the 3 layers .conv0, conv1, around.; it has 2: 4, 4",
        ),
        (ResidualBlock(), {"tiles": [4, 4, 1, 1]}, "it has 4"),
        (
            ResidualBlock(),
            {"tiles": {"conv9": 4}},
            "tiles names conv9; the model's layers are conv0, conv1, around, head",
        ),
        (ResidualBlock(), {"tiles": 4}, "pass images="),
        (ResidualBlock(), {"tiles": [99, 1, 1], "images": (2, 3, 8, 6)}, "conv0 has 48 patches.* given 99"),
        (ResidualBlock(), {"tiles": [12, 1, 1], "scheme": "alternate"}, "conv0: alternate needs a square number"),
        (
            ResidualBlock(),
            {"tiles": [49, 1, 1], "scheme": "alternate", "images": (2, 3, 8, 6)},
            "49 patches|at most 48|Use",
        ),
        (ResidualBlock(), {"tiles": [1, 1, 1], "init": "zeros"}, "init is one of weights, xavier"),
        (ResidualBlock(), {"tiles": 4, "images": (2, 5, 8, 6)}, "conv0 takes images .images, 3, h, w.; it got"),
        (ResidualBlock(), {"tiles": 4, "images": "many"}, "images is a batch of images or its shape"),
        (torch.nn.Conv2d(1, 1, 1), {"tiles": [1]}, "it is the model itself"),
    ],
)
def test_bad_input_to_convert(model, arguments, words):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=words):
        convert(copy.deepcopy(model), **arguments)
    assert model.state_dict().keys() == before.keys()


def test_bad_input_converted_twice_shared_unused_and_not_converted():
    model = ResidualBlock()
    convert(model, tiles=[1, 1, 1])
    with pytest.raises(UsageError, match="on tiles already: conv0, conv1, around"):
        convert(model, tiles=[1, 1, 1])
    shared = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.Conv2d(1, 1, 1))
    shared[1].weight = shared[0].weight
    with pytest.raises(UsageError, match="0 and 1 share one weight"):
        convert(shared, tiles=[1, 1])
    unused = ResidualBlock()
    unused.spare = torch.nn.Conv2d(1, 1, 1)
    with pytest.raises(UsageError, match="Images never reach spare: the model does not call it"):
        convert(unused, tiles=4, images=(2, 3, 8, 6))
    with pytest.raises(UsageError, match="no layers on tiles"):
        record(ResidualBlock(), (2, 3, 8, 6))
    with pytest.raises(UsageError, match="nothing to revert"):
        revert(ResidualBlock())


def test_bad_input_backward_twice():
    model = ResidualBlock()
    images = images_for(model)
    convert(model, tiles=[4, 4, 1])
    recording, tiles = opened_with(model, images, "serial")
    with tiles, on_tiles(recording, tiles, seed=7):
        loss = F.cross_entropy(model(*images), LABELS)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"goes through .* for the second time"):
            loss.backward()


def test_bad_input_too_many_images():
    model = ResidualBlock()
    images = images_for(model)
    convert(model, tiles=[4, 4, 1])
    recording, tiles = opened_with(model, images, "serial")
    with tiles, on_tiles(recording, tiles, seed=7), pytest.raises(UsageError, match="Open the fabric with `images`"):
        _ = [model(*images) for _ in range(20)]
