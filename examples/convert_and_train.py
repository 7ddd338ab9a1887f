"""An ordinary network is put on tiles that are Ray actors, trained, and taken off again."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import rapa_dist as rapa

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=200)
steps = parser.parse_args().steps


def batch(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw noisy images with a bright square in one of four corners, which is their class."""
    pixels, labels = 0.5 * torch.randn(images, 3, 32, 32), torch.randint(4, (images,))
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[:, 18 * (label // 2) :, 18 * (label % 2) :][:, :14, :14] += 1
    return pixels, labels


model = nn.Sequential(
    *(nn.Conv2d(3, 16, 5, padding=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4)),
    *(nn.Flatten(), nn.Linear(256, 4)),
)
print(rapa.convert(model, tiles=8, images=(10, 3, 32, 32), init="xavier"))
with rapa.open_fabric(model, "ray", images=(10, 3, 32, 32)):
    optimizer = rapa.RapaSGD(model, lr=0.05)
    for _ in range(steps):
        images, labels = batch(10)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
images, labels = batch(500)
wrong = (rapa.revert(model).eval()(images).argmax(dim=1) != labels).float().mean()
print(f"test error {100 * wrong:.1f} % as an ordinary network again")
