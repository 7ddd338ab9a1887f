"""VGG-11 (Simonyan & Zisserman 2014, configuration A), with one fully connected layer, as is usual for small images."""

from torch import Tensor, nn

_CHANNELS = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class VGG11(nn.Module):
    """Eight 3 × 3 convolutions in five stages with max pooling behind each, then the mean of every plane."""

    def __init__(self, classes: int, image: tuple[int, int, int]) -> None:
        """Build it for images of (channels, h, w), both at least 32."""
        super().__init__()
        layers: list[nn.Module] = []
        c_in = image[0]
        for stage in _CHANNELS:
            for c_out in stage:
                layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU()]
                c_in = c_out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(c_in, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores (images, classes) of images (images, channels, h, w)."""
        scores: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return scores
