"""The emulated machine: which layers it has, and the tiles each of them is spread over.

Arithmetic on shapes only; everything that sizes memory, processes or plots asks here.
"""

from dataclasses import dataclass
from functools import cached_property
from math import ceil

KERNEL_SIDE = 5  # every convolution of Caffe's "Full" CIFAR-10 network is 5×5, pad 2, stride 1
IMAGE_SIDE = 32
IMAGE_CHANNELS = 3
POOL_SIDE, POOL_STRIDE = 3, 2


def pooled_side(side: int) -> int:
    """Return the side of a plane after 3×3 pooling with stride 2, rounded up as Caffe does."""
    return ceil((side - POOL_SIDE) / POOL_STRIDE) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One tiled convolution: the shape of its kernel matrix and how often it is replicated."""

    index: int
    """Position in the network, from 0."""
    side: int
    """Pixels along one side of the input plane, and of the output plane."""
    c_in: int
    """Input channels."""
    c_out: int
    """Output channels: columns of the kernel matrix."""
    n_tiles: int
    """n_t: replicas of the kernel matrix, each on a tile of its own."""
    kernel_side: int = KERNEL_SIDE
    """Pixels along one side of the kernel. A machine can be planned with any; `train` has the default."""
    perforation: int = 1
    """In training one patch in so many is computed, and the others are dropped (scheme "perforated")."""

    @property
    def k(self) -> int:
        """Length of a patch: kh · kw · c_in."""
        return self.kernel_side * self.kernel_side * self.c_in

    @property
    def n_patches(self) -> int:
        """n_p: patches per image, one for each output pixel."""
        return self.side * self.side

    @property
    def kernel_shape(self) -> tuple[int, int]:
        """Shape of the matrix on one tile, (k + 1, c_out); the last row is the bias."""
        return self.k + 1, self.c_out

    @property
    def n_weights(self) -> int:
        """Weights on all tiles of the layer, biases included."""
        return self.n_tiles * (self.k + 1) * self.c_out


@dataclass(frozen=True)
class Machine:
    """All tile arrays of a network, first layer first."""

    layers: tuple[Layer, ...]

    @classmethod
    def build(cls, *, channels: tuple[int, ...], tiles: tuple[int, ...], perforated: bool = False) -> "Machine":
        """Lay out Caffe's "Full" CIFAR-10 network.

        Args:
            channels: c_out per layer.
            tiles: n_t per layer.
            perforated: whether every layer has one tile instead, that is spared as many patches as n_t tiles
                would share.
        """
        layers = []
        side, c_in = IMAGE_SIDE, IMAGE_CHANNELS
        for index, (c_out, number) in enumerate(zip(channels, tiles, strict=True)):
            n_tiles, perforation = (1, number) if perforated else (number, 1)
            layer = Layer(index=index, side=side, c_in=c_in, c_out=c_out, n_tiles=n_tiles, perforation=perforation)
            layers.append(layer)
            side, c_in = pooled_side(side), c_out
        return cls(tuple(layers))

    @cached_property
    def tiles(self) -> tuple[tuple[int, int], ...]:
        """Every tile as (layer, tile), in a fixed order: a tile's place here is its number."""
        return tuple((layer.index, tile) for layer in self.layers for tile in range(layer.n_tiles))

    @property
    def tiled(self) -> bool:
        """Whether some layer has several kernel matrices."""
        return any(layer.n_tiles > 1 for layer in self.layers)

    @property
    def n_weights(self) -> int:
        """Weights on all tiles of all layers (79,328 for the paper's untiled network)."""
        return sum(layer.n_weights for layer in self.layers)

    def digital_shapes(self, classes: int, pooling: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the digital side's parameters, by name.

        The fully connected layer has (features, classes) weights and (classes,) biases; "mixed" pooling a β
        for every channel, behind all layers but the last.
        """
        mixed = self.layers[:-1] if pooling == "mixed" else ()
        of_pooling: dict[str, tuple[int, ...]] = {f"pool.{layer.index}.beta": (layer.c_out,) for layer in mixed}
        return {"head.weight": (self.n_features, classes), "head.bias": (classes,)} | of_pooling

    @property
    def n_features(self) -> int:
        """Inputs of the fully connected layer: pixels × channels after the last pooling."""
        last = self.layers[-1]
        return pooled_side(last.side) ** 2 * last.c_out


def tile_name(layer: int, tile: int) -> str:
    """Return the name of a tile within its run: "L0/T003"."""
    return f"L{layer}/T{tile:03d}"
