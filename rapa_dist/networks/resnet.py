"""ResNet-18 (He, Zhang, Ren & Sun 2015), with the small stem that is usual for images below 64 × 64."""

import torch.nn.functional as F
from torch import Tensor, nn

_SMALL = 64
_CHANNELS = (64, 128, 256, 512)


class Block(nn.Module):
    """Two 3 × 3 convolutions with batch normalisation, and a way around them."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        """Build it; where the planes change their shape the way around is a 1 × 1 convolution."""
        super().__init__()
        self.conv0 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(c_out)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.around: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.around = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, planes: Tensor) -> Tensor:
        """Return (images, c_out, h / stride, w / stride)."""
        through = self.norm1(self.conv1(F.relu(self.norm0(self.conv0(planes)))))
        return F.relu(through + self.around(planes))


class ResNet18(nn.Module):
    """A stem, four stages of two blocks each, the mean of every plane, a fully connected layer."""

    def __init__(
        self, classes: int, image: tuple[int, int, int], *, widths: tuple[int, int, int, int] = _CHANNELS
    ) -> None:
        """Build it for images of (channels, h, w); `widths`: channels of the four stages."""
        super().__init__()
        channels, h, w = image
        small = min(h, w) < _SMALL
        stem: list[nn.Module] = [
            nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
            if small
            else nn.Conv2d(channels, widths[0], 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        ]
        if not small:
            stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        self.stem = nn.Sequential(*stem)
        blocks: list[nn.Module] = []
        c_in = widths[0]
        for stage, c_out in enumerate(widths):
            blocks += [Block(c_in, c_out, 1 if stage == 0 else 2), Block(c_out, c_out, 1)]
            c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(c_in, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores (images, classes) of images (images, channels, h, w)."""
        scores: Tensor = self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))
        return scores
