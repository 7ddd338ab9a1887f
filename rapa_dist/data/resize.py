"""Images of a data set of fixed size, resized like those of a folder."""

import numpy as np
from PIL import Image, ImageOps

from rapa_dist.console import work
from rapa_dist.data.sets import ImageSet


def resized(images: ImageSet, size: int | None) -> ImageSet:
    """Return images with both sides of `size` pixels, shorter side resized to it and cropped around the centre.

    None leaves them as they are.
    """
    n, h, w, channels = images.images.shape
    if size is None or (h, w) == (size, size):
        return images
    smaller = np.empty((n, size, size, channels), np.uint8)
    with work("resizing images", "images") as advance:
        for row, pixels in enumerate(images.images):
            picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
            fitted = np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR))
            smaller[row] = fitted.reshape(size, size, channels)
            advance(row + 1, n)
    return ImageSet(images=smaller, labels=images.labels)
