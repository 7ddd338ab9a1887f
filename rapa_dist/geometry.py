"""How the patches of a convolution lie on its planes: sizes, strides, borders. Arithmetic on shapes only.

A patch holds the kh · kw pixels that the kernel sees for one output pixel, ordered (kh, kw, c_in). Planes are padded
with zeros, as `torch.nn.Conv2d` pads them.
"""

from dataclasses import dataclass
from functools import cached_property

Pair = tuple[int, int]
"""(down, across)."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """One convolution on planes of one size, as `torch.nn.Conv2d` defines it."""

    size: Pair
    """Pixels of an input plane, h × w, without padding."""
    kernel: Pair = (1, 1)
    """Pixels under the kernel, kh × kw."""
    stride: Pair = (1, 1)
    """Pixels from one patch to the next."""
    before: Pair = (0, 0)
    """Zeros put above, and to the left of, a plane."""
    after: Pair = (0, 0)
    """Zeros put below, and to the right of, a plane."""
    dilation: Pair = (1, 1)
    """Pixels from one pixel under the kernel to the next."""

    def __post_init__(self) -> None:
        lengths = zip(self.padded, self.reach, strict=True)
        if any(length < reach for length, reach in lengths):
            (h, w), (kh, kw) = self.padded, self.reach
            raise ValueError(
                f"a kernel that reaches over {kh} × {kw} pixels needs at least as many; here are {h} × {w}"
            )

    @classmethod
    def padded_by(cls, padding: Pair | str, *, kernel: Pair, dilation: Pair, size: Pair, stride: Pair) -> "Geometry":
        """Return the geometry for a padding as `torch.nn.Conv2d` takes it: (down, across), "valid" or "same".

        Raises:
            ValueError: the planes are smaller than the kernel.
        """
        if padding == "same":  # where the zeros are odd in number, the one more is put behind
            total = [d * (length - 1) for d, length in zip(dilation, kernel, strict=True)]
            before = total[0] // 2, total[1] // 2
            after = total[0] - before[0], total[1] - before[1]
        else:
            before = after = (0, 0) if isinstance(padding, str) else padding
        return cls(size=size, kernel=kernel, stride=stride, before=before, after=after, dilation=dilation)

    @cached_property
    def padded(self) -> Pair:
        """Pixels of a padded plane."""
        return tuple(b + n + a for b, n, a in zip(self.before, self.size, self.after, strict=True))  # type: ignore[return-value]

    @cached_property
    def reach(self) -> Pair:
        """Pixels from the first to the last under the kernel, both counted."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))  # type: ignore[return-value]

    @cached_property
    def out(self) -> Pair:
        """Pixels of an output plane: one patch for each."""
        sides = zip(self.padded, self.reach, self.stride, strict=True)
        return tuple((length - reach) // step + 1 for length, reach, step in sides)  # type: ignore[return-value]

    @cached_property
    def n_patches(self) -> int:
        """n_p: patches per image."""
        height, width = self.out
        return height * width

    @cached_property
    def places(self) -> int:
        """Pixels of a patch, kh · kw."""
        kh, kw = self.kernel
        return kh * kw
