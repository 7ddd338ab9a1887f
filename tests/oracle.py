"""The paper's network (§2, §3), written out once more: double precision, a kernel for every patch, autograd.

Nothing here comes from rapa_dist. What a run draws is given: the tile of every patch, and the draws of stochastic
pooling. Planes are (images, channels, side, side); kernels (n_t, k + 1, c_out), k ordered (kh, kw, c_in), bias last;
the head's weights (classes, features), features ordered (channel, y, x).
"""

from math import isqrt

import numpy as np
import torch
import torch.nn.functional as F

SCHEMES = ("none", "random", "random-fixed", "alternate", "image-overlap", "image-pad", "perforated")


def map_of(scheme, n_tiles, side):
    """The rule of the paper's Fig. 2 for the tile of pixel (x, y), row by row, for schemes that draw nothing."""
    q = isqrt(n_tiles)
    if scheme == "none":
        return np.zeros(side * side, int)
    rule = {
        "alternate": lambda x, y: (x % q) + q * (y % q),
        "image-overlap": lambda x, y: (q * x) // side + q * ((q * y) // side),
    }[scheme.replace("image-pad", "image-overlap")]
    return np.array([rule(x, y) for y in range(side) for x in range(side)])


class Oracle:
    """The network, with parameters of its own."""

    def __init__(self, scheme, pooling, kernels, digital):
        self.scheme, self.pooling = scheme, pooling
        self.kernels = [torch.from_numpy(of_layer).double().requires_grad_() for of_layer in kernels]
        self.digital = {name: torch.from_numpy(value).double().requires_grad_() for name, value in digital.items()}

    def scores(self, images, tiles, draws=None):
        """(images, classes) for images (images, 3, side, side).

        Args:
            tiles: for every layer the tile of every patch of the mini-batch, -1 where it is dropped.
            draws: per layer but the last (images, side, side, channels) in [0, 1); None in a test.
        """
        planes = images.double()
        for layer, of_patch in enumerate(tiles):
            planes = self.convolve(planes, layer, of_patch)
            planes = self.behind_convolution(planes, layer, draws[layer] if draws and layer < len(draws) else None)
        return planes.flatten(1) @ self.digital["head.weight"].T + self.digital["head.bias"]

    def convolve(self, planes, layer, tiles):
        images, c_in, side, _ = planes.shape
        kernels = self.kernels[layer]
        patches = F.unfold(planes, 5, padding=2).view(images, c_in, 5, 5, side * side)
        if self.scheme == "image-pad":
            patches = patches * self._own_region(side, len(kernels))
        rows = patches.permute(0, 4, 2, 3, 1).reshape(images * side * side, -1)
        rows = torch.cat((rows, rows.new_ones(len(rows), 1)), dim=1)
        tiles = torch.as_tensor(tiles)
        if len(kernels) == 1:
            outputs = rows @ kernels[0]
        else:
            outputs = torch.bmm(rows[:, None], kernels[tiles.clamp_min(0)])[:, 0]
        outputs = outputs * (tiles >= 0)[:, None]
        return outputs.view(images, side, side, -1).permute(0, 3, 1, 2)

    @staticmethod
    def _own_region(side, n_tiles):
        """1 where a pixel of a patch is of the region that the patch's own pixel is of, (5, 5, side²)."""
        region = map_of("image-overlap", n_tiles, side).reshape(side, side)
        beyond = np.pad(region, 2, constant_values=-1)
        seen = [[beyond[dy : dy + side, dx : dx + side] == region for dx in range(5)] for dy in range(5)]
        return torch.from_numpy(np.array(seen).reshape(5, 5, -1).astype(float))

    def behind_convolution(self, planes, layer, draws=None):
        """Caffe's order: conv → pool → ReLU → LRN in layer 1, conv → ReLU → pool → LRN in layers 2 and 3."""
        method = "average" if layer == len(self.kernels) - 1 else self.pooling
        if layer == 0 and method != "stochastic":
            planes = self._pool(planes, layer, method, draws).relu()
        else:
            planes = self._pool(planes.relu(), layer, method, draws)
        return planes * (1 + 5e-5 * F.avg_pool2d(planes**2, 3, 1, 1)) ** -0.75

    def _pool(self, planes, layer, method, draws):
        if method in ("max", "average"):
            pool = F.max_pool2d if method == "max" else F.avg_pool2d
            return pool(planes, 3, 2, ceil_mode=True)
        if method == "mixed":
            alpha = 1 / (1 + torch.exp(10 * self.digital[f"stage{layer}.beta"]))[:, None, None]
            return alpha * self._pool(planes, layer, "average", None) + (1 - alpha) * self._pool(
                planes, layer, "max", None
            )
        return self._stochastic(planes, draws)

    @staticmethod
    def _stochastic(active, draws):
        """Zeiler & Fergus: a unit with probability a / Σ a; in a test Σ a² / Σ a. Windows end at the edge."""
        side = active.shape[2]
        beyond = (side + 1) % 2  # the last window of an even side hangs over by one
        windows = F.pad(active, (0, beyond, 0, beyond)).unfold(2, 3, 2).unfold(3, 3, 2).flatten(4)
        total = windows.sum(dim=4)
        if draws is None:
            return (windows**2).sum(dim=4) / total.clamp_min(1e-300)
        reached = windows.cumsum(dim=4) > (draws.double().permute(0, 3, 1, 2) * total)[..., None]
        first = reached.double().argmax(dim=4, keepdim=True)
        return windows.gather(4, first)[..., 0]

    def train(self, images, labels, tiles, draws, rate, decay):
        """One step of plain SGD: K ← (1 − λ · decay) K − λ dL/dK, and the same with the digital side; the loss."""
        parameters = [*self.kernels, *self.digital.values()]
        loss = F.cross_entropy(self.scores(images, tiles, draws), labels)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.mul_(1 - rate * decay).sub_(rate * gradient)
        return loss.item()

    def weights(self):
        """All parameters by name, as arrays."""
        kernels = {f"layer {layer}": kernels for layer, kernels in enumerate(self.kernels)}
        return {name: value.detach().numpy() for name, value in (kernels | self.digital).items()}
