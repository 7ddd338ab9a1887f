"""The shapes of the built-in data set, as functions of the plane.

Each takes x (to the right) and y (upwards), float32 of any equal shape, for a figure of about radius 1, and returns
about the distance to its outline: negative inside, positive outside. Every figure is its own mirror image, left to
right, so mirroring never changes a class.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.float32]
number = np.float32


def _bars(x: Plane, y: Plane) -> Plane:
    side = np.abs(x)
    middle, outer = side - number(0.17), np.abs(side - number(0.7)) - number(0.17)
    return np.maximum(np.minimum(middle, outer), np.abs(y) - number(0.9))


def _crescent(x: Plane, y: Plane) -> Plane:
    y = y + number(0.15)
    above = y - number(0.55)
    distance: Plane = np.maximum(_disc(x, y), number(0.85) - np.sqrt(x * x + above * above))
    return distance


def _cross(x: Plane, y: Plane) -> Plane:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - number(1), np.minimum(x, y) - number(0.33))


def _disc(x: Plane, y: Plane) -> Plane:
    return np.sqrt(x * x + y * y) - number(0.95)


def _frame(x: Plane, y: Plane) -> Plane:
    return np.abs(np.maximum(np.abs(x), np.abs(y)) - number(0.67)) - number(0.2)


def _heart(x: Plane, y: Plane) -> Plane:
    # A square on its corner, and a disc on the middle of each of its upper edges.
    half = 0.62
    x, y = np.abs(x), y + number(0.15)
    square = (x + np.abs(y)) * number(0.70710678) - number(half)
    right, up = x - number(0.70710678 * half), y - number(0.70710678 * half)
    distance: Plane = np.minimum(square, np.sqrt(right * right + up * up) - number(half))
    return distance


def _ring(x: Plane, y: Plane) -> Plane:
    return np.abs(np.sqrt(x * x + y * y) - number(0.77)) - number(0.22)


def _square(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.abs(x), np.abs(y)) - number(0.82)


def _star(x: Plane, y: Plane) -> Plane:
    # Fold the plane onto one half of the upper of five points; what is left is the distance to one edge.
    tip, depth = 1.1, 0.45
    x = np.abs(x)
    for across in (number(0.80901699), number(-0.80901699)):
        along = number(-0.58778525)
        over = number(2) * np.maximum(across * x + along * y, 0)
        x, y = x - over * across, y - over * along
    x, y = np.abs(x), y - number(tip)
    right, up = number(depth * 0.58778525), number(depth * 0.80901699 - 1)
    nearest = np.clip((x * right + y * up) / (right * right + up * up), 0, number(tip))
    a, b = x - right * nearest, y - up * nearest
    distance = np.sqrt(a * a + b * b)
    return np.where(y * right - x * up > 0, distance, -distance)


def _triangle(x: Plane, y: Plane) -> Plane:
    y = y + number(0.2)
    return np.maximum(-y, number(0.8660254) * np.abs(x) + number(0.5) * y) - number(0.58)


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "bars": _bars,
    "crescent": _crescent,
    "cross": _cross,
    "disc": _disc,
    "frame": _frame,
    "heart": _heart,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
"""Distance to the outline, by the class's name."""
