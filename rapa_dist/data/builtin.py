"""The built-in data set: ten kinds of shapes under random colour, place, size, tilt, texture and clutter.

Image i of a part is a function of (part, i): draw more and the first ones stay the same. Only operations that IEEE 754
rounds exactly are used (no sine, no exponential, no matrix product), so the images have the same bits on every machine.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from rapa_dist.data.sets import ImageSet
from rapa_dist.data.shapes import SHAPES
from rapa_dist.streams import Purpose, stream

Array = npt.NDArray[np.float32]

CLASSES = tuple(SHAPES)
TRAIN, TEST = 0, 1
DEFAULT = (5_000, 1_000)
"""Images drawn where no limit is given, by part."""
MOST = (50_000, 10_000)
"""Images that can be drawn at most, by part."""

# How hard the set is. With these the untiled network (λ = 0.005, one warm-up epoch) makes 12 to 14% errors on the test
# images after 10 epochs. Which side is the lighter, the tilt and the clutter matter most: with full turns and any two
# colours it makes 76%.
DARK = 0.5  # a background's channels are below, before its texture
LIGHT = 0.55  # a shape's channels are above
TILT = 0.27  # tangent of half the largest tilt: 30 degrees to either side
SHIFT = 3.0  # pixels from the middle, each way
RADIUS = (8.0, 12.0)  # pixels
STRETCH = (0.8, 1.25)
STROKES = 4  # pieces of clutter
IN_FRONT = 1  # of which lie over the shape
BLOTCHES = (0.4, 0.3)  # largest contrast of the coarse and the fine texture
GRAIN = 0.2  # largest contrast of the noise per pixel

SIDE = 32  # pixels along both sides
CHUNK = 20 * len(CLASSES)  # images drawn together: few enough to stay in the cache
COARSE, FINE = 5, 9  # knots per side of the two textures
PARTS = (96, 3 * COARSE**2, 3 * FINE**2, 3 * SIDE**2)  # random numbers: scalars, the textures' knots, the noise


def draw(part: int, n: int, advance: Callable[[int, int], None] = lambda done, total: None) -> ImageSet:
    """Draw the first `n` images of a part; the classes alternate: image i shows a `CLASSES[i % 10]`.

    Args:
        part: `TRAIN` or `TEST`.
        n: number of images.
        advance: called with (done, n) as it goes on.
    """
    images = np.empty((n, SIDE, SIDE, 3), dtype=np.uint8)
    for first in range(0, n, CHUNK):
        last = min(first + CHUNK, n)
        images[first:last] = _draw_chunk(part, first, last)
        advance(last, n)
    return ImageSet(images=images, labels=np.arange(n, dtype=np.int64) % len(CLASSES))


def _draw_chunk(part: int, first: int, last: int) -> npt.NDArray[np.uint8]:
    """Draw images `first` to `last` of a part, (n, 32, 32, 3); `first` is a multiple of the number of classes."""
    n = last - first
    numbers = np.empty((n, sum(PARTS)), dtype=np.float32)
    for i in range(n):
        stream(0, Purpose.BUILTIN, part, first + i).random(dtype=np.float32, out=numbers[i])
    scalars, coarse, fine, grain = np.split(numbers, np.cumsum(PARTS)[:-1], axis=1)
    u = _Numbers(scalars)

    background = u.colour(0, DARK)
    foreground = u.colour(LIGHT, 1)
    canvas = _background(u, background, coarse, fine)
    strokes = [_stroke(u) for _ in range(STROKES)]
    for coverage, colour in strokes[IN_FRONT:]:
        _paint(canvas, coverage, colour)
    _paint(canvas, _shape(u, n), foreground + u.between(-0.3, 0.3) * _ramp(u))
    for coverage, colour in strokes[:IN_FRONT]:
        _paint(canvas, coverage, colour)
    canvas += (grain.reshape(n, 3, -1).swapaxes(0, 1) - np.float32(0.5)) * u.between(0.02, GRAIN)
    np.clip(canvas, 0, 1, out=canvas)
    canvas *= 255
    canvas += np.float32(0.5)
    return canvas.astype(np.uint8).transpose(1, 2, 0).reshape(n, SIDE, SIDE, 3)


class _Numbers:
    """Uniform numbers of n images, (n, m), handed out column by column."""

    def __init__(self, columns: Array) -> None:
        self._columns = columns
        self._used = 0

    def between(self, low: float, high: float) -> Array:
        """Return the next number of each image, in low…high, (n, 1)."""
        self._used += 1
        column = self._columns[:, self._used - 1 : self._used]
        return np.float32(low) + np.float32(high - low) * column

    def colour(self, low: float, high: float) -> Array:
        """Return the next colour of each image, its channels in low…high, (3, n, 1)."""
        return np.stack([self.between(low, high) for _ in range(3)])

    def tilt(self, most: float) -> tuple[Array, Array]:
        """Return cosine and sine of an angle whose half has a tangent in ±most, two (n, 1)."""
        t = self.between(-most, most)
        return (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)


def _pixels() -> tuple[Array, Array]:
    """Return the pixels' centres as seen from the image's, in pixels: x and y, (1, 1024) each."""
    line = np.arange(SIDE, dtype=np.float32) - np.float32((SIDE - 1) / 2)
    return np.tile(line, SIDE)[None], np.repeat(line, SIDE)[None]


X, Y = _pixels()


def _ramp(u: _Numbers) -> Array:
    """Return a plane that rises across the image along a random direction, about -1 to 1, (n, 1024)."""
    c, s = u.tilt(1)
    return (c * X + s * Y) * np.float32(2 / SIDE)


def _blotches(values: Array, knots: int) -> Array:
    """Return a texture (3, n, 1024) in ±½, bilinear between knots × knots random values, (n, 3 · knots²)."""
    grid = values.reshape(-1, 3, knots, knots).swapaxes(0, 1) - np.float32(0.5)
    at = np.arange(SIDE, dtype=np.float32) * np.float32((knots - 1) / SIDE)
    below = np.floor(at).astype(np.intp)
    part = at - below.astype(np.float32)
    left, right = grid[..., below], grid[..., below + 1]
    lines = left + (right - left) * part  # (3, n, knots, 32)
    low, high = lines[:, :, below], lines[:, :, below + 1]
    texture: Array = low + (high - low) * part[:, None]
    return texture.reshape(3, -1, SIDE * SIDE)


def _background(u: _Numbers, colour: Array, coarse: Array, fine: Array) -> Array:
    """Return the empty canvas (3, n, 1024): a colour, soft blotches, a ramp of light and now and then stripes."""
    canvas = _blotches(coarse, COARSE) * u.between(0.1, BLOTCHES[0])
    canvas += _blotches(fine, FINE) * u.between(0.0, BLOTCHES[1])
    light = u.between(-0.3, 0.3) * _ramp(u)
    c, s = u.tilt(1)
    wave = (c * X + s * Y) / u.between(3, 9) + u.between(0, 1)
    wave -= np.floor(wave)
    light += np.maximum(u.between(-0.2, 0.2), 0) * (np.abs(wave - np.float32(0.5)) * 4 - 1)
    canvas += light
    canvas += colour
    return canvas


def _stroke(u: _Numbers) -> tuple[Array, Array]:
    """Return one piece of clutter, a short thick line: its coverage (n, 1024) and its colour (3, n, 1)."""
    x, y = X - u.between(-16, 16), Y - u.between(-16, 16)
    c, s = u.tilt(1)
    along, across = c * x + s * y, c * y - s * x
    over = np.maximum(np.abs(along) - u.between(0, 6), 0)
    coverage = u.between(0.6, 2.0) + np.float32(0.5) - np.sqrt(over * over + across * across)
    return np.clip(coverage, 0, 1), u.colour(0, 1)


def _shape(u: _Numbers, n: int) -> Array:
    """Return how much of each pixel the shape covers, 0…1, (n, 1024)."""
    x, y = X - u.between(-SHIFT, SHIFT), Y - u.between(-SHIFT, SHIFT)
    c, s = u.tilt(TILT)
    radius, stretch = u.between(*RADIUS), u.between(*STRETCH)
    right, up = (c * x + s * y) / (radius * stretch), (s * x - c * y) / (radius / stretch)
    outside = np.empty((n, SIDE * SIDE), dtype=np.float32)
    for label, distance in enumerate(SHAPES.values()):
        rows = slice(label, None, len(SHAPES))
        outside[rows] = distance(right[rows], up[rows])
    coverage: Array = np.clip(np.float32(0.5) - outside * radius, 0, 1)
    return coverage


def _paint(canvas: Array, coverage: Array, colour: Array) -> None:
    """Lay a colour, (3, n, 1 or 1024), over the canvas (3, n, 1024) where the coverage (n, 1024) says."""
    canvas += (colour - canvas) * coverage
