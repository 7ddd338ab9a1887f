"""AlexNet (Krizhevsky, Sutskever & Hinton 2012), without the split of its channels over two GPUs."""

from torch import Tensor, nn

_CHANNELS = (96, 256, 384, 384, 256)


class AlexNet(nn.Module):
    """Five convolutions with 96, 256, 384, 384 and 256 channels; three fully connected layers.

    Planes are brought to 6 × 6 before the fully connected layers, so that images of any size from 63 × 63 on will do.
    """

    def __init__(
        self,
        classes: int,
        image: tuple[int, int, int],
        *,
        widths: tuple[int, int, int, int, int] = _CHANNELS,
        hidden: int = 4096,
    ) -> None:
        """Build it for images of (channels, h, w).

        Args:
            classes: outputs.
            image: channels, h and w of an image.
            widths: channels of the five convolutions.
            hidden: units in each of two fully connected layers.
        """
        super().__init__()
        a, b, c, d, e = widths
        self.features = nn.Sequential(
            nn.Conv2d(image[0], a, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(a, b, 5, padding=2),
            nn.ReLU(),
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(b, c, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(c, d, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(d, e, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
        )
        self.pool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(e * 36, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores (images, classes) of images (images, channels, h, w)."""
        scores: Tensor = self.classifier(self.pool(self.features(images)).flatten(1))
        return scores
