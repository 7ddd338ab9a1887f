"""Models that are no mere chain of layers."""

import torch
import torch.nn.functional as F
from torch import nn


class ResidualBlock(nn.Module):
    """A block with batch normalisation, and a convolution around it."""

    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.around = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, images):
        planes = self.conv1(F.relu(self.norm(self.conv0(images)))) + self.around(images)
        return self.head(F.gelu(planes).mean(dim=(2, 3)))


class TwoInputs(nn.Module):
    """Images of two sizes, each with a convolution of its own."""

    def __init__(self):
        super().__init__()
        self.large = nn.Conv2d(3, 4, 3, stride=2)
        self.small = nn.Conv2d(1, 4, (1, 2))
        self.head = nn.Linear(8, 5)

    def forward(self, large, small):
        planes = [F.relu(self.large(large)).mean(dim=(2, 3)), F.relu(self.small(small)).mean(dim=(2, 3))]
        return self.head(torch.cat(planes, dim=1))


class UsedTwice(nn.Module):
    """A convolution through which every image passes twice, the second time on smaller planes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, images):
        planes = F.relu(self.conv(F.relu(self.stem(images))))
        planes = F.relu(self.conv(F.max_pool2d(planes, 2)))
        return self.head(planes.mean(dim=(2, 3)))


def images_for(model, images=4):
    """Return what a model takes."""
    torch.manual_seed(1)
    if isinstance(model, TwoInputs):
        return torch.randn(images, 3, 9, 8), torch.randn(images, 1, 5, 6)
    return (torch.randn(images, 3, 8, 6),)


MODELS = (ResidualBlock, TwoInputs, UsedTwice)
