"""Training from Python: `rapa.train` with a model and data of one's own."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import rapa_dist as rapa
from rapa_dist.coordinator.checkpoint import read
from rapa_dist.data.arrays import dataset_of
from rapa_dist.errors import DataError, UsageError

HOW = {"tiles": 4, "epochs": 2, "batch_size": 5, "lr": 0.05, "augment": False}


def model_of_ones_own() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, (3, 1), bias=False), nn.Dropout(0.2)),
        *(nn.Flatten(), nn.Linear(6 * 6 * 8, 3)),
    )


def some_data(n: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 10, 10), dtype=np.uint8), np.arange(n) % 3


DATA = (some_data(), some_data(9, seed=1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("trained"), model_of_ones_own()
    return folder, model, rapa.train(HOW, model=model, data=DATA, fabric="serial", run_dir=folder / "run")


def test_the_model_has_the_weights_of_the_checkpoint(trained):
    folder, model, result = trained
    assert result.finished
    found = read(folder / "run" / "checkpoints" / f"{result.checkpoint}.safetensors")
    assert found.arrays == ("0", "3")
    for name, kernels in zip(found.arrays, found.kernels, strict=True):
        np.testing.assert_array_equal(model.get_submodule(name).kernels.detach(), kernels)
    assert found.kernels[1].shape == (3, 12, 6), "no bias row; three tiles for 48 patches where 64 have four"
    assert found.digital["1.num_batches_tracked"] == 8
    np.testing.assert_array_equal(model.state_dict()["1.running_var"], found.digital["1.running_var"])
    assert result.as_dict()["epochs"] == 2


def test_a_run_is_resumed_with_the_same_bits(trained, tmp_path):
    _, _, undisturbed = trained
    rapa.train(HOW | {"epochs": 1}, model=model_of_ones_own(), data=DATA, fabric="serial", run_dir=tmp_path / "run")
    resumed = rapa.train(HOW, model=model_of_ones_own(), data=DATA, fabric="serial", resume=tmp_path / "run")
    assert resumed.as_dict()["weights_sha256"] == undisturbed.as_dict()["weights_sha256"]


def test_the_state_of_pytorchs_generator_is_the_users(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.random.fork_rng():
        model = model_of_ones_own()
    rapa.train(HOW | {"epochs": 1}, model=model, data=DATA, fabric="serial", run_dir=tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)


def test_data_may_be_a_dataset_of_pytorchs():
    images, labels = some_data()
    plain = dataset_of((images, labels), (images, labels))
    tensors = TensorDataset(torch.from_numpy(images[:, None] / 255).float(), torch.from_numpy(labels))
    pictures = [(Image.fromarray(image), int(label)) for image, label in zip(images, labels, strict=True)]
    for part in (tensors, pictures):
        assert dataset_of(part, part).fingerprint == plain.fingerprint
    assert plain.image == (1, 10, 10)
    assert plain.classes == ("0", "1", "2")
    assert len(dataset_of((images, labels), (images, labels), limit_train=7).train) == 7


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ([("cat", 0), ("dog", 1)], "Item 0 of the training set is no image: .*got str"),
        ([np.zeros((4, 4))], r"Item 0 of the training set is no pair \(image, label\), but ndarray"),
        ([(np.zeros((4, 4, 2)), 0)], r"Item 0 of the training set is no image.*shape \(4, 4, 2\)"),
        ([(np.full((4, 4), 7.0), 0)], "Item 0 of the training set has values from 7 to 7; expected bytes"),
        ([(np.zeros((4, 4)), 0), (np.zeros((4, 5)), 1)], "several shapes: 4 × 4 × 1, 4 × 5 × 1"),
        ([(np.zeros((4, 4)), "cat")], "Labels of training images are whole numbers"),
        ([(np.zeros((4, 4)), 0), (np.zeros((4, 4)), -1)], "labels of the training images are -1 … 0"),
        ([(np.zeros((4, 4)), 0)] * 3, "All images are of one class"),
        ([], "The training images are none"),
        ([(np.zeros((5, 4)), 0), (np.zeros((5, 4)), 1)], "Training images are 5 × 4 × 1 and test images 4 × 4 × 1"),
        ((np.zeros((3, 4, 4)), np.zeros(2, int)), "There are 3 training images and 2 labels"),
    ],
)
def test_bad_input_of_data(part, words):
    good = [(np.zeros((4, 4)), 0)]
    with pytest.raises(DataError, match=words):
        dataset_of(part, good)


def test_bad_input_to_train(tmp_path):
    with pytest.raises(UsageError, match=r"Unknown setting: tile. There are: .*tiles"):
        rapa.train({"tile": 4}, model=model_of_ones_own(), data=DATA)
    model = model_of_ones_own()
    rapa.convert(model, tiles=[2, 2])
    with pytest.raises(UsageError, match="on tiles already"):
        rapa.train(HOW, model=model, data=DATA)
    with pytest.raises(UsageError, match="run_dir and resume exclude each other"):
        rapa.train(HOW, model=model_of_ones_own(), data=DATA, run_dir=tmp_path / "a", resume=tmp_path / "b")
    with pytest.raises(UsageError, match="--fabric is one of"):
        rapa.train(HOW, model=model_of_ones_own(), data=DATA, fabric="cloud")
    with pytest.raises(UsageError, match=r"3 has 48 patches per image, so at most 48 tiles can work on it"):
        rapa.train(HOW | {"tiles": (4, 500)}, model=model_of_ones_own(), data=DATA, fabric="serial")
    assert not (tmp_path / "a").exists()
