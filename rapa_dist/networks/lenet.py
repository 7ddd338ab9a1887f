"""The LeNet that Gokmen, Onen & Haensch trained on resistive arrays (Frontiers in Neuroscience 11:538, 2017)."""

from torch import Tensor, nn


class LeNet(nn.Module):
    """Two 5 × 5 convolutions with 16 and 32 kernels, tanh and 2 × 2 max pooling behind each; 128 hidden units."""

    def __init__(self, classes: int, image: tuple[int, int, int]) -> None:
        """Build it for images of (channels, h, w), both at least 16."""
        super().__init__()
        channels, h, w = image
        self.conv0 = nn.Conv2d(channels, 16, 5)
        self.conv1 = nn.Conv2d(16, 32, 5)
        self.pool = nn.MaxPool2d(2)
        sides = (((side - 4) // 2 - 4) // 2 for side in (h, w))
        pixels = 1
        for side in sides:
            pixels *= max(side, 1)  # images that are too small are refused where a convolution does not take them
        self.hidden = nn.Linear(32 * pixels, 128)
        self.head = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores (images, classes) of images (images, channels, h, w)."""
        planes = self.pool(self.conv0(images).tanh())
        planes = self.pool(self.conv1(planes).tanh())
        scores: Tensor = self.head(self.hidden(planes.flatten(1)).tanh())
        return scores
