"""Networks as users bring them, `--network small_networks:…`: presets with few channels, and some that are wrong."""

import torch
from torch import nn

from rapa_dist.networks.alexnet import AlexNet
from rapa_dist.networks.resnet import ResNet18


def resnet18(classes, image):
    return ResNet18(classes, image, widths=(4, 4, 6, 6))


def alexnet(classes, image):
    return AlexNet(classes, image, widths=(6, 8, 6, 6, 4), hidden=16)


def pooled(classes, image):
    """A convolution followed by max pooling in a function, one by average pooling, one by nothing."""
    return Pooled(classes, image)


class Pooled(nn.Module):
    def __init__(self, classes, image):
        super().__init__()
        self.first, self.norm = nn.Conv2d(image[0], 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.third = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1)
        self.head = nn.Linear(4, classes)

    def forward(self, images):
        planes = torch.max_pool2d(torch.relu(self.norm(self.first(images))), 2)
        planes = nn.functional.avg_pool2d(torch.relu(self.second(planes)), 2)
        return self.head(torch.relu(self.third(planes)).mean(dim=(2, 3)))


def failing(classes, image):
    raise ValueError("no such thing")


def no_module(classes, image):
    return "a network"


def of_squares(classes, image):
    """It takes other images than it is made for."""
    return nn.Sequential(nn.Conv2d(image[0], 2, 3), nn.Flatten(), nn.Linear(17, classes))


def without_convolutions(classes, image):
    return nn.Sequential(nn.Flatten(), nn.Linear(image[0] * image[1] * image[2], classes))


def of_five_classes(classes, image):
    return nn.Sequential(nn.Conv2d(image[0], 5, image[1]), nn.Flatten())


def odd(classes, image):
    """It says where its own fault lies."""
    return OddOne()


class OddOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, images):
        return self.conv(images).no_such_method()


not_callable = 3
