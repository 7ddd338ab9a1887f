"""ReLU, pooling and normalisation in C, on channels-last planes."""

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from rapa_dist.native import native

_POINTER = ctypes.c_void_p


class _Sizes(ctypes.Structure):
    """struct stage of stage.c."""

    _fields_ = (
        *[
            (name, ctypes.c_int64)
            for name in ("images", "h", "w", "channels", "pooled_h", "pooled_w", "average", "relu_first")
        ],
        ("alpha", ctypes.c_double),
        ("beta", ctypes.c_double),
    )


class Left(NamedTuple):
    """What the forward pass leaves for the way back."""

    sizes: Any
    planes: Tensor
    smaller: Tensor
    places: Tensor | None
    ratio: Tensor
    factor: Tensor


@functools.cache
def _functions() -> tuple[Any, Any] | None:
    library = native().library
    if library is None:
        return None
    forward, backward = library.rapa_stage_forward, library.rapa_stage_backward
    forward.argtypes, backward.argtypes = [_POINTER] * 7, [_POINTER] * 8
    return forward, backward


@functools.lru_cache(maxsize=256)
def _sizes(
    shape: torch.Size, pooled: tuple[int, int], average: bool, relu_first: bool, alpha: float, beta: float
) -> tuple[Any, int]:
    sizes = _Sizes(*shape[:3], shape[3], *pooled, average, relu_first, alpha, beta)
    return sizes, ctypes.addressof(sizes)


def does(planes: Tensor, method: str) -> bool:
    """Return whether the library has these passes for such planes, (images, h, w, channels).

    Not where somebody watches PyTorch's operations, as who counts the wins of max pooling does.
    """
    return (
        method in ("max", "average")
        and planes.dtype == torch.float32
        and planes.device.type == "cpu"
        and planes.is_contiguous()
        and _functions() is not None
        and _get_current_dispatch_mode() is None
    )


def forward(
    planes: Tensor, pooled: tuple[int, int], *, average: bool, relu_first: bool, alpha: float, beta: float
) -> tuple[Tensor, Left]:
    """Return the smaller planes, after ReLU and normalisation, and what `backward` needs.

    Args:
        planes: (images, h, w, channels), for which `does` holds.
        pooled: height and width of the smaller planes.
        average: whether windows are averaged; else the largest value counts.
        relu_first: whether ReLU stands before the pooling, or behind it.
        alpha: of the normalisation.
        beta: of the normalisation; 0.75 is what the library knows.
    """
    assert beta == 0.75
    functions = _functions()
    assert functions is not None
    images, *_, channels = planes.shape
    smaller, ratio, factor, normalised = torch.empty(4, images, *pooled, channels).unbind()
    places = None if average else torch.empty(smaller.shape, dtype=torch.uint8)
    sizes = _sizes(planes.shape, pooled, average, relu_first, alpha, beta)
    at_places = None if places is None else places.data_ptr()
    failed = functions[0](
        sizes[1],
        planes.data_ptr(),
        smaller.data_ptr(),
        at_places,
        ratio.data_ptr(),
        factor.data_ptr(),
        normalised.data_ptr(),
    )
    if failed:
        raise MemoryError
    return normalised, Left(sizes, planes, smaller, places, ratio, factor)


def backward(left: Left, errors: Tensor) -> Tensor:
    """Return the errors of the planes, from those of the smaller ones, (images, h, w, channels) in one piece."""
    functions = _functions()
    assert functions is not None
    sizes, planes, smaller, places, ratio, factor = left
    back = torch.empty_like(planes)
    failed = functions[1](
        sizes[1],
        planes.data_ptr(),
        smaller.data_ptr(),
        None if places is None else places.data_ptr(),
        ratio.data_ptr(),
        factor.data_ptr(),
        errors.data_ptr(),
        back.data_ptr(),
    )
    if failed:
        raise MemoryError
    return back
